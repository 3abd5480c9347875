"""Solves as registered PyTorch operators, for callers who compile, export or capture them; one operator a solve.

Each does a fixed amount of work and never waits for the device: `torch.compile(fullgraph=True)` keeps it in the graph, and a
CUDA graph that holds it can be replayed on new weights. Whether an answer is exact is told by a tensor; `decompose` raises
instead, chooses the solver, and stops when it is done. Nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmorph.equation.arithmetic import exact_arithmetic
from fastmorph.equation.backends import find_backend
from fastmorph.equation.backends.torch_backend import frobenius
from fastmorph.equation.frame import Frame, Side, make_frame
from fastmorph.equation.half_step import HalfStep, per_item
from fastmorph.equation.solvers.sweeps import alternate_half_steps
from fastmorph.errors import MorphError


def alternate(
    weight: Tensor,
    first: Tensor,
    second_size: Sequence[int],
    half_steps: int = 1,
    *,
    backend: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """So many half-steps of Algorithm 1 (Wei et al. 2016): F2 for F1, F1 for F2, ..., each refined once.

    An item that is exact keeps its kernels from then on; one whose system is singular keeps those that it had. Where Claim 1
    holds, one half-step is exact.

    Args:
        weight: G, (B, Co, Ci, *K), 0 to 3 spatial dimensions, float32 or float64: the dtype that is worked in.
        first: F1 to start from, (B, Ch, Ci, *K1), of the dtype of `weight`: noise, as a rule.
        second_size: K2, one size for each spatial dimension.
        half_steps: how many, at least 1.
        backend: as in `decompose`.
        precision: how float32 products are taken by the kernels, "ieee" (None), "tf32x3" or "tf32".

    Returns:
        first (B, Ch, Ci, *K1) and second (B, Co, Ch, *K2), as they come, not equalised, and residual (B,), relative: 1 where
        no half-step could be solved.

    Raises:
        MorphError: shapes, dtypes, backend or precision do not fit.
    """
    frame = _frame(weight, first, second_size, half_steps)
    if precision is None and weight.dtype == torch.float32:
        precision = "ieee"
    chosen = find_backend(backend, weight, precision)
    kernels: tuple[Tensor, Tensor, Tensor] = _alternate(
        weight, first, list(frame.second), half_steps, chosen.name, precision or "float64"
    )
    return kernels


@torch.library.custom_op("fastmorph::alternate", mutates_args=())
def _alternate(
    weight: Tensor, first: Tensor, second_size: Sequence[int], half_steps: int, backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    return fixed_half_steps(weight, first, tuple(second_size), half_steps, backend, precision)


@_alternate.register_fake
def _alternate_fake(
    weight: Tensor, first: Tensor, second_size: Sequence[int], half_steps: int, backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (weight.shape[0], weight.shape[1], first.shape[1], *second_size)
    return torch.empty_like(first, memory_format=torch.contiguous_format), first.new_empty(shape), first.new_empty(len(first))


def fixed_half_steps(
    weight: Tensor, first: Tensor, second_size: tuple[int, ...], half_steps: int, backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The body of the operator `alternate`, whose arguments these are, in plain PyTorch and the backend's maps."""
    maps = find_backend(backend, weight, None if weight.dtype == torch.float64 else precision)
    frame = Frame(tuple(weight.shape[3:]), tuple(first.shape[3:]), second_size)
    # Scaled by a power of two, exactly: squares of very small or large weights would leave the range. F2 takes it back.
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=tuple(range(1, weight.ndim)))
    whole = torch.where(largest > 0, largest, torch.ones_like(largest)).log2().floor()
    lift = (whole / 2).floor()  # in two parts, each of which is representable
    exponent = whole - lift
    weight = torch.ldexp(torch.ldexp(weight, -_column(exponent, weight)), -_column(lift, weight))
    norm = frobenius(weight)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    exact = 32 * torch.finfo(weight.dtype).eps  # beyond this a half-step only moves rounding about
    residual = torch.ones_like(norm)

    def half_step(side: Side, fixed: Tensor, last: Tensor, target: Tensor, within: Frame) -> Tensor:
        nonlocal residual
        step = HalfStep(fixed, within.second, maps, wait=False)
        found = step.solve(target, within.before)
        kernel, _, left = step.refine(found, *step.error(target, within.before, found), target, within.before)
        moves = ~step.singular & ~(residual <= exact) & torch.isfinite(left)
        residual = torch.where(moves, left / scale, residual)
        return per_item(moves, kernel, last)

    with exact_arithmetic():
        second = weight.new_zeros(*weight.shape[:2], first.shape[1], *second_size)
        one, two = alternate_half_steps(weight, frame, first, second, range(half_steps), half_step)
    two = torch.ldexp(torch.ldexp(two, _column(exponent, two)), _column(lift, two))
    contiguous = torch.contiguous_format
    return one.clone(memory_format=contiguous), two.clone(memory_format=contiguous), residual


def _column(exponents: Tensor, kernel: Tensor) -> Tensor:
    return exponents.view(-1, *(1,) * (kernel.ndim - 1))


def _frame(weight: Tensor, first: Tensor, second_size: Sequence[int], half_steps: int) -> Frame:
    if weight.dtype not in (torch.float32, torch.float64) or first.dtype != weight.dtype or first.device != weight.device:
        raise MorphError(
            f"alternate works in float32 or float64, in one dtype and on one device; weight is {weight.dtype} on "
            f"{weight.device}, first {first.dtype} on {first.device}: convert them with .to()."
        )
    if weight.ndim < 3 or first.ndim != weight.ndim or (first.shape[0], first.shape[2]) != (weight.shape[0], weight.shape[2]):
        raise MorphError(
            f"alternate needs weight (B, Co, Ci, *K) and first (B, Ch, Ci, *K1), but they have shapes {tuple(weight.shape)} "
            f"and {tuple(first.shape)}."
        )
    if half_steps < 1:
        raise MorphError(f"half_steps={half_steps} must be at least 1.")
    return make_frame(weight.shape[3:], (tuple(first.shape[3:]), tuple(second_size)))
