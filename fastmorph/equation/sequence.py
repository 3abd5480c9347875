"""More than two kernels: a weight as a sequence of kernels in a row, and as a sum of such sequences.

A sequence is peeled off one kernel at a time, G = rest * F1, then rest = rest' * F2, and so on, each an equation of two.
A sum is the weight cut at random into one part for each branch, each part then a sequence of its own: the subnet morphs of the
paper ("Network Morphism", Section 3.4, and "Modularized Transaction of Neural Networks", Wei et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmorph.equation.arrays import Restore, to_tensor
from fastmorph.equation.bounds import tolerance
from fastmorph.equation.decompose import compose, decompose
from fastmorph.equation.decomposition import Decomposition, InexactMorphError
from fastmorph.equation.frame import Frame, Size, size_per_dimension, window
from fastmorph.equation.problem import check_dims, check_rank
from fastmorph.equation.randomness import Generator, draw_seed
from fastmorph.errors import MorphError


@dataclass(frozen=True)
class Chain:
    """Kernels in a row.

    Attributes:
        kernels: from the input to the output, (*B, C1, Ci, *K1), (*B, C2, C1, *K2), ..., (*B, Co, Cn, *Kn).
        before: where the weight's first tap stands in the composed kernel, of size sum(Ki - 1) + 1; negative in a branch of a
            sum whose composed kernel is smaller than the weight.
        residual: (*B,) relative Frobenius norm of what the kernels, as returned, miss of what they stand for, in float64.
        converged: (*B,) whether that counts as exact: at most `fastmorph.tolerance` for each equation solved.
        steps: the decompositions, one fewer than there are kernels; their kernels are in float64.
    """

    kernels: tuple[Any, ...]
    before: Size
    residual: Any
    converged: Any
    steps: tuple[Decomposition, ...]


@dataclass(frozen=True)
class Sum:
    """Sequences side by side, whose composed kernels, laid over one another as `Chain.before` says, add up to a weight.

    Attributes:
        branches: one chain for each branch.
        residual: (*B,) relative Frobenius norm of what the sum misses of the weight, in float64.
        converged: (*B,) whether every branch is exact.
    """

    branches: tuple[Chain, ...]
    residual: Any
    converged: Any


@torch.no_grad()
def decompose_sequence(
    weight: Any,
    hidden_channels: Sequence[int],
    kernel_sizes: Sequence[int | Sequence[int]],
    *,
    spatial_dims: int = 2,
    **options: Any,
) -> Chain:
    """Split a weight into any number of kernels in a row, exactly.

    Args:
        weight: G, (*B, Co, Ci, *K), as in `decompose`.
        hidden_channels: channels between the kernels, one fewer than there are kernels. Each must be enough for the equation
            that it stands in, whose weight is what the kernels before it left over.
        kernel_sizes: one for each kernel, with sum(Ki - 1) + 1 >= K.
        spatial_dims: as in `decompose`.
        **options: `solver`, `backend`, `generator` and `allow_inexact` of `decompose`, for each equation.

    Raises:
        MorphError: as `decompose` does; the message names the kernel.
        InexactMorphError: an equation was not solved exactly.
    """
    tensor, restore, dims = _checked(weight, spatial_dims)
    sizes = _sizes(hidden_channels, kernel_sizes, dims)
    kernels, before, steps = _peel(tensor.double(), hidden_channels, sizes, dims, options)
    kernels = [kernel.to(tensor.dtype) for kernel in kernels]
    missed = _padded(tensor.double(), before, _reach(sizes, dims), dims) - _joined(kernels, dims)
    return _chain(kernels, before, _relative(missed, tensor, dims), steps, tensor.dtype, restore)


@torch.no_grad()
def decompose_sum(
    weight: Any,
    branches: Sequence[tuple[Sequence[int], Sequence[int | Sequence[int]]]],
    *,
    spatial_dims: int = 2,
    generator: Generator = None,
    **options: Any,
) -> Sum:
    """Split a weight into a sum of branches, each a sequence of kernels, exactly.

    The weight is shared out among the branches, each share with noise of its own; one branch that reaches over the whole
    kernel takes what is left. Branches that reach less far (a 1x1 beside a 3x3) get the taps that they reach.

    Args:
        weight: G, (*B, Co, Ci, *K), as in `decompose`.
        branches: (hidden_channels, kernel_sizes) of each, as in `decompose_sequence`; ((), (k,)) is a single kernel.
        spatial_dims: as in `decompose`.
        generator: as in `decompose`.
        **options: `solver`, `backend` and `allow_inexact` of `decompose`, for each equation.

    Raises:
        MorphError: no branch reaches over the whole kernel, or as `decompose_sequence` does, with the branch.
        InexactMorphError: an equation was not solved exactly.
    """
    tensor, restore, dims = _checked(weight, spatial_dims)
    content = tuple(tensor.shape[tensor.ndim - dims :])
    sizes = [_sizes(*branch, dims) for branch in branches]
    reaches = [_reach(each, dims) for each in sizes]
    whole = next((j for j, n in enumerate(reaches) if all(a >= k for a, k in zip(n, content, strict=True))), None)
    if whole is None:
        raise MorphError(f"no branch reaches over the whole kernel of size {content}; enlarge the kernels of one of them.")
    rest = tensor.double()
    noise = torch.Generator(rest.device).manual_seed(draw_seed(generator))
    spread = rest.flatten(-dims - 2).square().mean(-1).sqrt() / len(branches)
    answers: dict[int, tuple[Tensor, Size, list[Tensor], Size, list[Decomposition]]] = {}
    for j in (*(i for i in range(len(branches)) if i != whole), whole):
        size = tuple(min(n, k) for n, k in zip(reaches[j], content, strict=True))
        offset = tuple((k - n) // 2 for k, n in zip(content, size, strict=True))
        cut = (..., *window(offset, size))
        if j == whole:
            share = rest
        else:
            draw = torch.randn(rest[cut].shape, generator=noise, device=rest.device, dtype=rest.dtype)
            share = rest[cut] / len(branches) + draw * spread.view(*spread.shape, *(1,) * (dims + 2))
            rest = rest.clone()
            rest[cut] -= share
        try:
            found = _peel(share, branches[j][0], sizes[j], dims, {**options, "generator": generator})
        except MorphError as error:
            raise _prefixed(error, f"branch {j}") from None
        answers[j] = (share, offset, *found)
    missed, chains = tensor.double(), []
    for j in range(len(branches)):
        share, offset, kernels, before, steps = answers[j]
        kernels = [kernel.to(tensor.dtype) for kernel in kernels]
        whole_kernel = _joined(kernels, dims)
        off = _relative(_padded(share, before, reaches[j], dims) - whole_kernel, share, dims)
        at = tuple(b - o for b, o in zip(before, offset, strict=True))
        chains.append(_chain(kernels, at, off, steps, tensor.dtype, restore))
        missed = missed - _cropped(whole_kernel, at, content, dims)
    residual = _relative(missed, tensor, dims)
    converged = torch.stack([torch.as_tensor(chain.converged) for chain in chains]).all(0)
    return Sum(tuple(chains), restore(residual), restore(converged))


def _checked(weight: Any, spatial_dims: int) -> tuple[Tensor, Restore, int]:
    dims = check_dims(spatial_dims)
    tensor, restore = to_tensor(weight, "weight")
    check_rank(tensor, dims, "weight", "(*B, C_out, C_in, *K)")
    return tensor, restore, dims


def _sizes(hidden_channels: Sequence[int], kernel_sizes: Sequence[int | Sequence[int]], dims: int) -> list[Size]:
    if len(kernel_sizes) != len(hidden_channels) + 1:
        raise MorphError(
            f"{len(kernel_sizes)} kernels in a row have {len(kernel_sizes) - 1} numbers of hidden channels between them; got "
            f"{len(hidden_channels)}."
        )
    return [size_per_dimension(size, dims) if dims else () for size in kernel_sizes]


def _reach(sizes: Sequence[Size], dims: int) -> Size:
    """Size of the composed kernel."""
    return tuple(sum(size[d] - 1 for size in sizes) + 1 for d in range(dims))


def _peel(
    weight: Tensor, hidden_channels: Sequence[int], sizes: Sequence[Size], dims: int, options: dict[str, Any]
) -> tuple[list[Tensor], Size, list[Decomposition]]:
    """Kernels in float64, where the weight stands in their composition, and the equations solved."""
    content = tuple(weight.shape[weight.ndim - dims :])
    reach = _reach(sizes, dims)
    if any(n < k for n, k in zip(reach, content, strict=True)):
        raise MorphError(
            f"kernel sizes {list(sizes)} compose to {reach}, smaller than the weight's {content}; enlarge one of them."
        )
    kernels: list[Tensor] = []
    steps: list[Decomposition] = []
    rest, before = weight, (0,) * dims
    for index, hidden in enumerate(hidden_channels):
        second = _second_size(rest, hidden, sizes[index:], dims)
        try:
            step = decompose(rest, hidden, (sizes[index], second), spatial_dims=dims, **options)
        except MorphError as error:
            raise _prefixed(error, f"kernel {index} of {len(sizes)}") from None
        content = tuple(rest.shape[rest.ndim - dims :])
        before = tuple(b + c for b, c in zip(before, Frame(content, sizes[index], second).before, strict=True))
        kernels.append(step.first)
        steps.append(step)
        rest = step.second
    if not hidden_channels:  # a single kernel: the weight itself, with zeros around it
        before = Frame(content, sizes[0], (1,) * dims).before
        rest = _padded(rest, before, sizes[0], dims)
    return [*kernels, rest], before, steps


def _second_size(rest: Tensor, hidden: int, sizes: Sequence[Size], dims: int) -> Size:
    """Size of what is left after the kernel of size sizes[0]: as small as it may be, so that the next equations are easy.

    But where the closed form needs the whole weight in what is left (few hidden channels), that is what is left.
    """
    if len(sizes) == 2:
        return sizes[1]
    content = tuple(rest.shape[rest.ndim - dims :])
    co, ci = rest.shape[rest.ndim - dims - 2 : rest.ndim - dims]
    smallest = tuple(max(1, k - n + 1) for k, n in zip(content, sizes[0], strict=True))
    fits = all(n >= k for n, k in zip(_reach(sizes[1:], dims), content, strict=True))
    in_first = all(n == 1 for n in smallest) and hidden >= co
    return content if fits and not in_first and hidden >= ci else smallest


def _joined(kernels: Sequence[Tensor], dims: int) -> Tensor:
    whole = kernels[0].double()
    for kernel in kernels[1:]:
        whole = compose(whole, kernel.double(), spatial_dims=dims)
    return whole


def _padded(weight: Tensor, before: Size, size: Size, dims: int) -> Tensor:
    out = weight.new_zeros(*weight.shape[: weight.ndim - dims], *size)
    out[(..., *window(before, tuple(weight.shape[weight.ndim - dims :])))] = weight
    return out


def _cropped(composed: Tensor, at: Size, size: Size, dims: int) -> Tensor:
    """The part of a composed kernel that lies over a weight of `size`, whose first tap stands at `at` in it."""
    widths = [w for n, b, k in zip(composed.shape[composed.ndim - dims :], at, size, strict=True) for w in (-b, b + k - n)]
    widths = [w for pair in reversed(list(zip(widths[::2], widths[1::2], strict=True))) for w in pair]
    return torch.nn.functional.pad(composed, widths) if dims else composed


def _relative(missed: Tensor, weight: Tensor, dims: int) -> Tensor:
    norm = weight.double().flatten(-dims - 2).norm(dim=-1)
    return missed.flatten(-dims - 2).norm(dim=-1) / torch.where(norm > 0, norm, torch.ones_like(norm))


def _chain(
    kernels: list[Tensor], before: Size, residual: Tensor, steps: list[Decomposition], dtype: torch.dtype, restore: Restore
) -> Chain:
    converged = residual <= tolerance(dtype) * max(1, len(steps))
    return Chain(tuple(map(restore, kernels)), before, restore(residual), restore(converged), tuple(steps))


def _prefixed(error: MorphError, where: str) -> MorphError:
    if isinstance(error, InexactMorphError):
        return InexactMorphError(f"{where}: {error}", error.decomposition)
    return MorphError(f"{where}: {error}")
