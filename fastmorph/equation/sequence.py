"""More than two kernels: a weight as a sequence of kernels in a row, and as a sum of such sequences.

A sequence is peeled off one kernel at a time, G = rest * F1, then rest = rest' * F2, and so on, each an equation of two.
For a sum the weight is shared out at random, and each share becomes a sequence of its own. These are the subnet morphs of the
paper ("Network Morphism", Section 3.4, and "Modularized Transaction of Neural Networks", Wei et al. 2017).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Generic

import torch
from torch import Tensor

from fastmorph.equation.backends.torch_backend import frobenius, pad
from fastmorph.equation.bounds import tolerance
from fastmorph.equation.decompose import compose, decompose
from fastmorph.equation.decomposition import Array, Decomposition
from fastmorph.equation.frame import Size
from fastmorph.equation.peel import Peeling, find_whole, plan_peeling, share_out
from fastmorph.equation.problem import CheckedWeight, check_weight
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
        spatial_dims, solver, backend, generator, allow_inexact: as in `decompose`, for each equation.

    Raises:
        MorphError: as `decompose` does; the message names the kernel.
        InexactMorphError: an equation was not solved exactly.
    """
    given = check_weight(weight, spatial_dims, torch.float64)
    (_, co, ci), kernel = given.weight.shape[:3], tuple(given.weight.shape[3:])
    row = plan_peeling(kernel, co, ci, hidden_channels, kernel_sizes)
    if row.share != kernel:
        raise MorphError(
            f"kernel sizes {list(row.sizes)} compose to {row.reach}, smaller than the weight's {kernel}; enlarge one of them."
        )
    solve = partial(decompose, solver=solver, backend=backend, allow_inexact=allow_inexact)
    return _chain(given, row, given.weight, Stream(draw_seed(generator)), solve)[0]


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
        spatial_dims, solver, backend, generator, allow_inexact: as in `decompose`, for each equation.

    Raises:
        MorphError: no branch reaches over the whole kernel, or as `decompose_sequence` does, with the branch.
        InexactMorphError: an equation was not solved exactly.
    """
    given = check_weight(weight, spatial_dims, torch.float64)
    (_, co, ci), kernel = given.weight.shape[:3], tuple(given.weight.shape[3:])
    rows = {index: plan_peeling(kernel, co, ci, *branch) for index, branch in enumerate(branches)}
    whole = find_whole(rows, kernel)
    source, number = Stream(draw_seed(generator)), itertools.count()

    def noise(shape: Size) -> Tensor:
        return source.of("share", next(number)).tensor(shape, given.weight)

    solve = partial(decompose, solver=solver, backend=backend, allow_inexact=allow_inexact)
    chains: dict[int, Chain[Array]] = {}
    missed = given.weight
    for index, share in share_out(given.weight, rows, whole, noise, torch.float64).items():
        try:
            chains[index], composed = _chain(given, rows[index], share, source.of("branch", index), solve)
        except MorphError as error:
            raise error.within(f"branch {index}") from None
        missed = missed - pad(composed, tuple(-b for b in rows[index].before), kernel)  # beyond it there is rounding alone
    converged = torch.stack([torch.as_tensor(chain.converged) for chain in chains.values()]).all(0)
    residual = _relative(missed, given.weight).reshape(given.batch_shape)
    return Sum(tuple(chains[index] for index in rows), given.restore(residual), given.restore(converged))


def _chain(
    given: CheckedWeight, row: Peeling, share: Tensor, source: Stream, solve: Callable[..., Decomposition[Tensor]]
) -> tuple[Chain[Any], Tensor]:
    """A row of kernels for its share (B, Co, Ci, *share) of the weight, and what they compose to as they are given back."""
    rest = share.reshape(*given.batch_shape, *share.shape[1:])
    steps: list[Decomposition[Tensor]] = []
    for index in range(len(row.frames)):
        try:
            steps.append(solve(**vars(row.problem(index, rest)), generator=source.of(index).seed))
        except MorphError as error:
            raise error.within(f"kernel {index} of {len(row.sizes)}") from None
        rest = steps[-1].second
    found = [*(step.first for step in steps), rest] if steps else [row.single(share)]
    kernels = [kernel.reshape(-1, *kernel.shape[-share.ndim + 1 :]).to(given.dtype) for kernel in found]
    composed = reduce(partial(compose, spatial_dims=len(row.reach)), (kernel.double() for kernel in kernels))
    residual = _relative(pad(share, row.share_before, row.reach) - composed, share).reshape(given.batch_shape)
    converged = residual <= tolerance(given.dtype) * max(1, len(steps))
    back = tuple(given.restore_kernel(kernel, index, len(kernels)) for index, kernel in enumerate(kernels))
    return Chain(back, row.before, given.restore(residual), given.restore(converged), tuple(steps)), composed


def _relative(missed: Tensor, weight: Tensor) -> Tensor:
    """Norms of (B, ...) over those of the weights, (B,); absolute where a weight is zero."""
    norm = frobenius(weight)
    return frobenius(missed) / torch.where(norm > 0, norm, torch.ones_like(norm))
