"""More than two kernels: a weight as a sequence of kernels in a row, and as a sum of such sequences.

A sequence is peeled off one kernel at a time, G = rest * F1, then rest = rest' * F2, and so on, each an equation of two.
A sum is the weight cut at random into one part for each branch, each part then a sequence of its own: the subnet morphs of the
paper ("Network Morphism", Section 3.4, and "Modularized Transaction of Neural Networks", Wei et al. 2017).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypedDict

import torch
from torch import Tensor

from fastmorph.equation.arrays import Restore, times_power_of_two
from fastmorph.equation.bounds import tolerance
from fastmorph.equation.decompose import compose, decompose
from fastmorph.equation.decomposition import Array, Decomposition
from fastmorph.equation.frame import Size
from fastmorph.equation.peel import Peeling, find_whole, plan_peeling, share_out
from fastmorph.equation.problem import check_weight, in_range
from fastmorph.equation.randomness import Generator, Stream, draw_seed
from fastmorph.equation.solvers import Auto, Solver
from fastmorph.errors import MorphError


@dataclass(frozen=True)
class Chain(Generic[Array]):
    """Kernels in a row.

    Attributes:
        kernels: from the input to the output, (*B, C1, Ci, *K1), (*B, C2, C1, *K2), ..., (*B, Co, Cn, *Kn).
        before: where the weight's first tap stands in the composed kernel, of size sum(Ki - 1) + 1; negative in a branch of a
            sum whose composed kernel is smaller than the weight.
        residual: (*B,) relative Frobenius norm of what the kernels, as returned, miss of what they stand for, in float64.
        converged: (*B,) whether that counts as exact: at most `fastmorph.tolerance` for each equation solved.
        steps: the decompositions, one fewer than there are kernels; their kernels are in float64, of a weight divided by a
            power of two where it is very small or large.
    """

    kernels: tuple[Array, ...]
    before: Size
    residual: Array
    converged: Array
    steps: tuple[Decomposition[Tensor], ...]


@dataclass(frozen=True)
class Sum(Generic[Array]):
    """Sequences side by side, whose composed kernels, laid over one another as `Chain.before` says, add up to a weight.

    Attributes:
        branches: one chain for each branch.
        residual: (*B,) relative Frobenius norm of what the sum misses of the weight, in float64.
        converged: (*B,) whether every branch is exact.
    """

    branches: tuple[Chain[Array], ...]
    residual: Array
    converged: Array


@torch.no_grad()
def decompose_sequence(
    weight: Array,
    hidden_channels: Sequence[int],
    kernel_sizes: Sequence[int | Sequence[int]],
    *,
    spatial_dims: int = 2,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    generator: Generator = None,
    allow_inexact: bool = False,
) -> Chain[Array]:
    """Split a weight into any number of kernels in a row, exactly.

    Args:
        weight: G, (*B, Co, Ci, *K), as in `decompose`.
        hidden_channels: channels between the kernels, one fewer than there are kernels. Each must be enough for the equation
            that it stands in, whose weight is what the kernels before it left over.
        kernel_sizes: one for each kernel, with sum(Ki - 1) + 1 >= K.
        spatial_dims: as in `decompose`.
        solver: as in `decompose`, for each equation.
        backend: as in `decompose`.
        generator: as in `decompose`.
        allow_inexact: as in `decompose`.

    Raises:
        MorphError: as `decompose` does; the message names the kernel.
        InexactMorphError: an equation was not solved exactly.
    """
    given = _weight(weight, spatial_dims)
    row = plan_peeling(given.kernel, *given.channels, hidden_channels, kernel_sizes)
    if row.share != given.kernel:
        raise MorphError(
            f"kernel sizes {list(row.sizes)} compose to {row.reach}, smaller than the weight's {given.kernel}; enlarge one of "
            "them."
        )
    options: _Options = {"solver": solver, "backend": backend, "allow_inexact": allow_inexact}
    return _chain(given, row, given.scaled, *_peel(given.scaled, row, Stream(draw_seed(generator)), options))[0]


@torch.no_grad()
def decompose_sum(
    weight: Array,
    branches: Sequence[tuple[Sequence[int], Sequence[int | Sequence[int]]]],
    *,
    spatial_dims: int = 2,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    generator: Generator = None,
    allow_inexact: bool = False,
) -> Sum[Array]:
    """Split a weight into a sum of branches, each a sequence of kernels, exactly.

    The weight is shared out among the branches, each share with noise of its own; one branch that reaches over the whole
    kernel takes what is left. Branches that reach less far (a 1x1 beside a 3x3) get the taps that they reach.

    Args:
        weight: G, (*B, Co, Ci, *K), as in `decompose`.
        branches: (hidden_channels, kernel_sizes) of each, as in `decompose_sequence`; ((), (k,)) is a single kernel.
        spatial_dims: as in `decompose`.
        solver: as in `decompose`, for each equation.
        backend: as in `decompose`.
        generator: as in `decompose`.
        allow_inexact: as in `decompose`.

    Raises:
        MorphError: no branch reaches over the whole kernel, or as `decompose_sequence` does, with the branch.
        InexactMorphError: an equation was not solved exactly.
    """
    given = _weight(weight, spatial_dims)
    rows = {index: plan_peeling(given.kernel, *given.channels, *branch) for index, branch in enumerate(branches)}
    whole = find_whole(rows, given.kernel)
    source, number = Stream(draw_seed(generator)), itertools.count()

    def noise(shape: Size) -> Tensor:
        return source.of("share", next(number)).tensor(shape, given.scaled)

    options: _Options = {"solver": solver, "backend": backend, "allow_inexact": allow_inexact}
    chains: dict[int, Chain[Array]] = {}
    missed = given.scaled
    for index, share in share_out(given.scaled, rows, whole, noise, torch.float64).items():
        try:
            peeled = _peel(share, rows[index], source.of("branch", index), options)
        except MorphError as error:
            raise error.within(f"branch {index}") from None
        chains[index], composed = _chain(given, rows[index], share, *peeled)
        missed = missed - _placed(composed, tuple(-b for b in rows[index].before), given.kernel)
    converged = torch.stack([torch.as_tensor(chain.converged) for chain in chains.values()]).all(0)
    residual = _relative(missed, given.scaled, spatial_dims)
    return Sum(tuple(chains[index] for index in rows), given.restore(residual), given.restore(converged))


class _Options(TypedDict):
    solver: Solver
    backend: str | None
    allow_inexact: bool


class _Weight(NamedTuple):
    """A weight (*B, Co, Ci, *K) to split: in float64 near 1, and the way back from there."""

    scaled: Tensor
    exponents: tuple[int, ...] | None
    dtype: torch.dtype
    restore: Restore
    channels: tuple[int, int]
    kernel: Size


def _weight(weight: Any, spatial_dims: int) -> _Weight:
    tensor, restore, dims = check_weight(weight, spatial_dims)
    cut = tensor.ndim - dims - 2
    scaled, exponents = in_range(tensor.double().reshape(-1, *tensor.shape[cut:]))
    co, ci, *kernel = tensor.shape[cut:]
    return _Weight(scaled.reshape(tensor.shape), exponents, tensor.dtype, restore, (co, ci), tuple(kernel))


def _peel(share: Tensor, row: Peeling, source: Stream, options: _Options) -> tuple[list[Tensor], list[Decomposition[Tensor]]]:
    """The row's kernels, in float64, and the equations solved for them."""
    if not row.frames:
        return [row.single(share)], []
    steps: list[Decomposition[Tensor]] = []
    for index in range(len(row.frames)):
        problem = row.problem(index, steps[-1].second if steps else share)
        sizes = (problem.weight, problem.hidden_channels, problem.kernel_sizes)
        try:
            steps.append(decompose(*sizes, spatial_dims=problem.spatial_dims, generator=source.of(index).seed, **options))
        except MorphError as error:
            raise error.within(f"kernel {index} of {len(row.sizes)}") from None
    return [*(step.first for step in steps), steps[-1].second], steps


def _chain(
    given: _Weight, row: Peeling, share: Tensor, kernels: list[Tensor], steps: list[Decomposition[Tensor]]
) -> tuple[Chain[Any], Tensor]:
    """The kernels as they are given back, with what they miss of their share, and what they compose to in float64."""
    dims, count = len(row.reach), len(kernels)
    kernels = [kernel.to(given.dtype) for kernel in kernels]
    composed = kernels[0].double()
    for kernel in kernels[1:]:
        composed = compose(composed, kernel.double(), spatial_dims=dims)
    behind = tuple(b + o for b, o in zip(row.before, row.offset, strict=True))
    residual = _relative(_placed(share, behind, row.reach) - composed, share, dims)
    if given.exponents is not None:  # each kernel takes its part of what the weight was divided by
        for index, kernel in enumerate(kernels):
            part = [e * (index + 1) // count - e * index // count for e in given.exponents]
            flat = kernel.reshape(-1, *kernel.shape[kernel.ndim - dims - 2 :])
            kernels[index] = times_power_of_two(flat, part).reshape(kernel.shape)
    restore, converged = given.restore, residual <= tolerance(given.dtype) * max(1, len(steps))
    return Chain(tuple(map(restore, kernels)), row.before, restore(residual), restore(converged), tuple(steps)), composed


def _placed(kernel: Tensor, before: Size, size: Size) -> Tensor:
    """A kernel behind `before` zeros in a frame of `size`; where those are negative or the frame is smaller, cut off."""
    inner = kernel.shape[kernel.ndim - len(size) :]
    widths = [w for b, k, n in reversed(list(zip(before, inner, size, strict=True))) for w in (b, n - k - b)]
    return torch.nn.functional.pad(kernel, widths) if widths else kernel


def _relative(missed: Tensor, weight: Tensor, dims: int) -> Tensor:
    norm = weight.double().flatten(-dims - 2).norm(dim=-1)
    return missed.flatten(-dims - 2).norm(dim=-1) / torch.where(norm > 0, norm, torch.ones_like(norm))
