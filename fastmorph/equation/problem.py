"""One equation to solve, and what is checked before any work."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self

import torch
from torch import Tensor

from fastmorph.elsewhere import Elsewhere
from fastmorph.equation.arrays import Restore, host_waits, refuse_transforms, times_power_of_two, to_tensor
from fastmorph.equation.backends import Backend, find_backend
from fastmorph.equation.decomposition import Array
from fastmorph.equation.frame import Frame, make_frame, tap_count
from fastmorph.equation.solvers import Choice, Solver
from fastmorph.errors import MorphError

# Weights up to 2 to this power, or its inverse, are solved as they are: their squares and fourth powers stay in range.
_LARGEST_EXPONENT, _LARGEST_IN_FLOAT32 = 200, 24


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
class CheckedWeight:
    """A weight that passed its checks, as one to compute with, and the way back to the caller's.

    Attributes:
        weight: (B, Co, Ci, *K), with one batch dimension.
        batch_shape: *B, as the caller has it.
        dtype: the caller's.
        exponents: powers of two by which the items were divided, so that no square leaves the range; None: by none.
        restore: turns a tensor into the caller's kind of array.
    """

    weight: Tensor
    batch_shape: torch.Size
    dtype: torch.dtype
    exponents: tuple[int, ...] | None
    restore: Restore

    def in_range(self) -> Self:
        """The same weight near 1, by powers of two. Raises MorphError for entries that are NaN or infinite."""
        weight, exponents = _in_range(self.weight)
        return replace(self, weight=weight, exponents=exponents)

    def restore_kernel(self, kernel: Tensor, index: int, count: int) -> Any:
        """Kernel `index` of `count` in a row, (B, ...) -> (*B, ...), times its part of what the weight was divided by."""
        if self.exponents is not None:
            kernel = times_power_of_two(kernel, [e * (index + 1) // count - e * index // count for e in self.exponents])
        return self.restore(kernel.reshape(*self.batch_shape, *kernel.shape[1:]))


@dataclass(frozen=True, eq=False)
class Checked(CheckedWeight):
    """A problem that passed its checks.

    Attributes:
        hidden: C_hid.
        frame: the kernel sizes.
        backend: the linear maps.
        choice: the solver that will run, and what was found out on the way to it.
        measured: whether entries are known to be finite and in range. Where to know it the host would have to wait, and the
            choice does not depend on them, that is found out with the residual: `in_range` then says what is to be solved.
    """

    hidden: int
    frame: Frame
    backend: Backend
    choice: Choice
    measured: bool = True


def check(problem: Problem[Any], *, solver: Solver, backend: str | None, precision: str | None, allow_inexact: bool) -> Checked:
    """Refuse, in a sentence, what cannot be solved, and choose the solver.

    Raises MorphError.
    """
    if not isinstance(problem, Problem):
        raise MorphError(f"a {type(problem).__name__} is not a problem; pass fm.Problem(weight, hidden_channels, ...).")
    given = _check_shape(problem.weight, problem.spatial_dims, None)
    weight, hidden = given.weight, check_hidden(problem.hidden_channels)
    if not isinstance(solver, Solver):
        raise MorphError(
            f"solver={solver!r} is not a solver; pass fm.Auto(), fm.Direct(), fm.General() or fm.Practical(), or an fm.Solver "
            "of your own."
        )
    frame = make_frame(weight.shape[3:], problem.kernel_sizes)
    batch, co, ci = weight.shape[:3]
    entries = hidden * (ci * tap_count(frame.first) + co * tap_count(frame.second)) * batch
    kernels = f"hidden_channels={hidden}: two kernels of sizes {frame.first} and {frame.second}"
    check_memory(kernels, entries * weight.element_size(), weight.device, "ask for fewer channels or smaller kernels")
    away = isinstance(problem.weight, Elsewhere)
    measured = not ((away or host_waits(weight.device)) and solver.chooses_by_sizes(co, ci, hidden, frame))
    given = given.in_range() if measured else given
    chosen = find_backend(backend, weight, precision)
    choice = solver.choose(given.weight, hidden, frame, allow_inexact=allow_inexact)
    return Checked(**vars(given), hidden=hidden, frame=frame, backend=chosen, choice=choice, measured=measured)


def check_weight(weight: Any, spatial_dims: int, work: torch.dtype | None = None) -> CheckedWeight:
    """A weight (*B, Co, Ci, *K), detached, near 1, and in the dtype `work` if one is given.

    Raises MorphError for what is no weight, for none that has entries, and for entries that are NaN or infinite.
    """
    return _check_shape(weight, spatial_dims, work).in_range()


def _check_shape(weight: Any, spatial_dims: int, work: torch.dtype | None) -> CheckedWeight:
    """The same, without a look at its entries."""
    dims = check_dims(spatial_dims)
    tensor, restore = to_tensor(weight, "weight")
    refuse_transforms(tensor, "decompose")
    check_rank(tensor, dims, "weight", "(*B, C_out, C_in, *K)")
    cut = tensor.ndim - dims - 2
    if 0 in tensor.shape[cut:]:
        raise MorphError(f"weight has shape {tuple(tensor.shape)}: it has no entries to compose.")
    flat = tensor.detach().to(work or tensor.dtype).reshape(-1, *tensor.shape[cut:])
    return CheckedWeight(flat, tensor.shape[:cut], tensor.dtype, None, restore)


def check_hidden(hidden: Any) -> int:
    """Raise MorphError unless hidden channels are a positive int."""
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise MorphError(f"hidden_channels={hidden!r} must be a positive int.")
    return hidden


def _in_range(weight: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """(B, ...) with very small and very large items divided by powers of two, exactly, and the exponents of these powers.

    Raises MorphError for entries that are NaN or infinite.
    """
    dims = tuple(range(1, weight.ndim))
    # Vectorised, as the infinity norm is not; where one is no number, both are.
    ends = zip(weight.amax(dims).tolist(), weight.amin(dims).tolist(), strict=True)
    largest = [max(high, -low) for high, low in ends]
    if are_in_range(largest, weight.dtype):
        return weight, None
    if not all(map(math.isfinite, largest)):
        bad = int((~torch.isfinite(weight)).sum())
        raise MorphError(f"weight has {bad} entries that are NaN or infinite; no composition of finite kernels equals them.")
    exponents = tuple(math.frexp(value)[1] for value in largest)
    return times_power_of_two(weight, [-e for e in exponents]), exponents


def are_in_range(largest: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether items of `dtype` whose largest magnitudes these are can be solved as they are."""
    most = _LARGEST_EXPONENT if dtype == torch.float64 else _LARGEST_IN_FLOAT32
    return all(math.isfinite(value) and abs(math.frexp(value)[1]) <= most for value in largest)


def check_memory(what: str, size: int, device: torch.device | None, remedy: str) -> None:
    """Raise MorphError for what takes more bytes than a device has."""
    limit = memory_of(device)
    if size > limit:
        asked = min(size, 10**300) / 1e9  # floats end at 1e308
        raise MorphError(f"{what} would take {asked:,.4g} GB, and there are {limit / 1e9:,.4g} GB in all; {remedy}.")


def memory_of(device: torch.device | None) -> int:
    """Bytes of memory that a device has: a CUDA device its own, any other one, the meta device and None the CPU's."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no POSIX system
        return 2**40


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
