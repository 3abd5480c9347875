"""One equation to solve, and what is checked before any work."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from torch import Tensor

from fastmorph.equation.arrays import Restore, host_waits, refuse_transforms, times_power_of_two, to_tensor
from fastmorph.equation.backends import Backend, find_backend
from fastmorph.equation.decomposition import Array
from fastmorph.equation.frame import Frame, make_frame, tap_count
from fastmorph.equation.solvers import Choice, Solver
from fastmorph.errors import MorphError

# Weights up to 2 to this power, or its inverse, are solved as they are: their squares and fourth powers stay in range.
_LARGEST_EXPONENT = {torch.float64: 200}
_LARGEST_EXPONENT_SHORT = 24


@dataclass(frozen=True, eq=False)
class Problem(Generic[Array]):
    """An equation for `decompose_many`: the arguments of `decompose` that have the same names.

    Attributes:
        weight: G, (*B, Co, Ci, *K).
        hidden_channels: C_hid.
        kernel_sizes: (K1, K2), each an int or one int per spatial dimension.
        spatial_dims: 0 (linear layers) to 3.
    """

    weight: Array
    hidden_channels: int
    kernel_sizes: Sequence[int | Sequence[int]] = (3, 3)
    spatial_dims: int = 2


@dataclass(frozen=True, eq=False)
class Checked:
    """A problem that passed its checks.

    Attributes:
        weight: (B, Co, Ci, *K), with one batch dimension.
        exponents: powers of two by which the items were divided, so that no square leaves the range; None: by none.
        measured: whether entries are known to be finite and in range. Where to know it the host would have to wait, and the
            choice does not depend on them, that is found out with the residual: `in_range` then says what is to be solved.
        choice: the solver that will run, and what was found out on the way to it.
    """

    weight: Tensor
    batch_shape: torch.Size
    hidden: int
    frame: Frame
    restore: Restore
    backend: Backend
    exponents: tuple[int, ...] | None
    choice: Choice
    measured: bool = True

    def in_range(self) -> Checked:
        """The same problem with its entries measured. Raises MorphError where they are NaN or infinite."""
        weight, exponents = in_range(self.weight)
        return replace(self, weight=weight, exponents=exponents, measured=True)


def check(problem: Problem[Any], *, solver: Solver, backend: str | None, precision: str | None, allow_inexact: bool) -> Checked:
    """Refuse, in a sentence, what cannot be solved, and choose the solver.

    Raises MorphError.
    """
    if not isinstance(problem, Problem):
        raise MorphError(f"a {type(problem).__name__} is not a problem; pass fm.Problem(weight, hidden_channels, ...).")
    weight, restore, dims = check_weight(problem.weight, problem.spatial_dims)
    hidden = check_hidden(problem.hidden_channels)
    if not isinstance(solver, Solver):
        raise MorphError(
            f"solver={solver!r} is not a solver; pass fm.Auto(), fm.Direct(), fm.General() or fm.Practical(), or an fm.Solver "
            "of your own."
        )
    cut = weight.ndim - dims - 2
    frame = make_frame(weight.shape[cut + 2 :], problem.kernel_sizes)
    _check_memory(weight, cut, hidden, frame)
    flat, exponents = weight.reshape(-1, *weight.shape[cut:]), None
    measured = not (host_waits(weight.device) and solver.chooses_by_sizes(flat.shape[1], flat.shape[2], hidden, frame))
    if measured:
        flat, exponents = in_range(flat)
    chosen = find_backend(backend, weight, precision)
    choice = solver.choose(flat, hidden, frame, allow_inexact=allow_inexact)
    return Checked(flat, weight.shape[:cut], hidden, frame, restore, chosen, exponents, choice, measured)


def check_weight(weight: Any, spatial_dims: int) -> tuple[Tensor, Restore, int]:
    """A weight (*B, Co, Ci, *K) as a detached tensor, the way back to its kind, and its number of spatial dimensions.

    Raises MorphError for what is no weight, or none that has entries.
    """
    dims = check_dims(spatial_dims)
    tensor, restore = to_tensor(weight, "weight")
    refuse_transforms(tensor, "decompose")
    check_rank(tensor, dims, "weight", "(*B, C_out, C_in, *K)")
    if 0 in tensor.shape[tensor.ndim - dims - 2 :]:
        raise MorphError(f"weight has shape {tuple(tensor.shape)}: it has no entries to compose.")
    return tensor.detach(), restore, dims


def check_hidden(hidden: Any) -> int:
    """Raise MorphError unless hidden channels are a positive int."""
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise MorphError(f"hidden_channels={hidden!r} must be a positive int.")
    return hidden


def in_range(weight: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """Items of (B, ...) near 1: very small and very large ones times a power of two, exactly, whose exponents come second.

    Raises MorphError for entries that are NaN or infinite.
    """
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=tuple(range(1, weight.ndim))).double().tolist()
    if are_in_range(largest, weight.dtype):
        return weight, None
    if not all(map(math.isfinite, largest)):
        bad = int((~torch.isfinite(weight)).sum())
        raise MorphError(f"weight has {bad} entries that are NaN or infinite; no composition of finite kernels equals them.")
    exponents = tuple(math.frexp(value)[1] for value in largest)
    return times_power_of_two(weight, [-e for e in exponents]), exponents


def are_in_range(largest: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether items of `dtype` whose largest magnitudes these are can be solved as they are."""
    most = _LARGEST_EXPONENT.get(dtype, _LARGEST_EXPONENT_SHORT)
    return all(math.isfinite(value) and abs(math.frexp(value)[1]) <= most for value in largest)


def _check_memory(weight: Tensor, cut: int, hidden: int, frame: Frame) -> None:
    """Raise MorphError where the two kernels alone would not fit into the device's memory."""
    co, ci = weight.shape[cut : cut + 2]
    entries = hidden * (ci * tap_count(frame.first) + co * tap_count(frame.second)) * weight.shape[:cut].numel()
    needed, there = entries * weight.element_size(), _memory(weight.device)
    if needed > there:
        raise MorphError(
            f"hidden_channels={hidden} and kernel sizes {frame.first} and {frame.second} make kernels of {needed / 2**30:.3g} "
            f"GiB, more than the {there / 2**30:.3g} GiB that {weight.device} has; ask for fewer channels or smaller kernels."
        )


def _memory(device: torch.device) -> float:
    """Bytes of memory that a device has; infinite where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def check_dims(spatial_dims: int) -> int:
    """Raise MorphError unless there are 0 to 3 spatial dimensions."""
    if not isinstance(spatial_dims, int) or isinstance(spatial_dims, bool) or spatial_dims not in (0, 1, 2, 3):
        raise MorphError(f"spatial_dims={spatial_dims!r} must be 0 (linear), 1, 2 or 3.")
    return int(spatial_dims)


def check_rank(tensor: Tensor, dims: int, name: str, layout: str) -> None:
    """Raise MorphError unless `tensor` has two channel dimensions besides its spatial ones."""
    if tensor.ndim < dims + 2:
        raise MorphError(
            f"{name} has shape {tuple(tensor.shape)}, too few dimensions for {layout} with {dims} spatial dimension(s); "
            f"pass spatial_dims= (0 for linear layers)."
        )
