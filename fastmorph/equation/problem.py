"""One equation to solve, and what is checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmorph.equation.arrays import Restore, to_tensor
from fastmorph.equation.backends import TorchBackend, find_backend
from fastmorph.equation.bounds import rank_bound, smallest_exact, tolerance
from fastmorph.equation.frame import Frame, make_frame
from fastmorph.equation.solvers import Solver
from fastmorph.errors import MorphError


@dataclass(frozen=True, eq=False)
class Problem:
    """What `decompose` is to split: the arguments of the same names.

    Attributes:
        weight: G, (*B, Co, Ci, *K).
        hidden_channels: C_hid.
        kernel_sizes: (K1, K2), each an int or one int per spatial dimension.
        spatial_dims: 0 (linear layers) to 3.
    """

    weight: Any
    hidden_channels: int
    kernel_sizes: Sequence[int | Sequence[int]] = (3, 3)
    spatial_dims: int = 2


@dataclass(frozen=True, eq=False)
class Checked:
    """A problem that passed its checks: `weight` (B, Co, Ci, *K) with one batch dimension, and the solver that will run."""

    weight: Tensor
    batch_shape: torch.Size
    hidden: int
    frame: Frame
    restore: Restore
    backend: TorchBackend
    solver: Solver
    reason: str


def check(problem: Problem, *, solver: Solver, backend: str | None, precision: str | None, allow_inexact: bool) -> Checked:
    """Refuse, in a sentence, what cannot be solved, and choose the solver.

    Raises MorphError.
    """
    dims = check_dims(problem.spatial_dims)
    weight, restore = to_tensor(problem.weight, "weight")
    check_rank(weight, dims, "weight", "(*B, C_out, C_in, *K)")
    hidden = problem.hidden_channels
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise MorphError(f"hidden_channels={hidden!r} must be a positive int.")
    if not isinstance(solver, Solver):
        raise MorphError(f"solver={solver!r} is not a solver; pass fm.Auto(), fm.Direct(), fm.General() or fm.Practical().")
    cut = weight.ndim - dims - 2
    if 0 in weight.shape[cut:]:
        raise MorphError(f"weight has shape {tuple(weight.shape)}: it has no entries to compose.")
    frame = make_frame(weight.shape[cut + 2 :], problem.kernel_sizes)
    # A sum is finite only if all its terms are; it costs a twentieth of looking at each.
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise MorphError(f"weight has {bad} entries that are NaN or infinite; no composition of finite kernels equals them.")
    flat = weight.reshape(-1, *weight.shape[cut:])
    chosen = find_backend(backend, weight, precision)
    solver, reason = _choose(solver, flat, hidden, frame, allow_inexact=allow_inexact)
    return Checked(flat, weight.shape[:cut], hidden, frame, restore, chosen, solver, reason)


def check_dims(spatial_dims: int) -> int:
    """Raise MorphError unless there are 0 to 3 spatial dimensions."""
    if isinstance(spatial_dims, bool) or spatial_dims not in (0, 1, 2, 3):
        raise MorphError(f"spatial_dims={spatial_dims!r} must be 0 (linear), 1, 2 or 3.")
    return int(spatial_dims)


def check_rank(tensor: Tensor, dims: int, name: str, layout: str) -> None:
    """Raise MorphError unless `tensor` has two channel dimensions besides its spatial ones."""
    if tensor.ndim < dims + 2:
        raise MorphError(
            f"{name} has shape {tuple(tensor.shape)}, too few dimensions for {layout} with {dims} spatial dimension(s); "
            f"pass spatial_dims= (0 for linear layers)."
        )


def _choose(solver: Solver, weight: Tensor, hidden: int, frame: Frame, *, allow_inexact: bool) -> tuple[Solver, str]:
    if allow_inexact:
        return solver.chosen_for(weight, hidden, frame, allow_inexact=True)
    if hidden < min(weight.shape[1:3]) and len(weight):
        rank = int(rank_bound(weight, 0.5 * tolerance(weight.dtype)).max())
        if rank > hidden:
            raise MorphError(
                f"hidden_channels={hidden} is too few: the weight has rank {rank} across its channels, which no composition "
                f"through {hidden} channels has; the smallest number that can be exact is "
                f"{smallest_exact(frame, *weight.shape[1:3])}. "
                f"allow_inexact=True gives the nearest answer."
            )
    return solver.chosen_for(weight, hidden, frame, allow_inexact=False)
