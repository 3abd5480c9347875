"""Closed forms of many weights as a registered operator, and the validated function in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import Precision
from ..compose.op import compose_torch
from ..direct.op import check_equation, fill_plainly
from ..noise import signs
from ..register import register
from ..support import six_dimensional, three

SUMS = 8  # of channels on a side, from which what is left is estimated
FEW = 4 * SUMS  # channels up to which a side is not added up


class Equation(NamedTuple):
    """One weight to split, as `direct` takes it."""

    weight: Tensor
    hidden_channels: int
    k1: Sequence[int]
    k2: Sequence[int]
    before: Sequence[int]
    seeds: Sequence[int]
    into_first: bool = True


def direct_many(
    equations: Sequence[Equation | tuple[Any, ...]],
    *,
    density: float = 1.0,
    precision: Precision = "tf32x3",
    limit: float = 0.0,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Split weights of unlike sizes as `direct` does, and estimate what is left of each, in about as many launches as for one.

    There is a launch for each step, and in steps that read or write the kernels one for each class of problems that agree in
    what is known when compiling: kernel sizes, how they lie in memory, whether pairs are shared. A table of the problems is
    copied to the device once, which the host does not wait for. It holds addresses, so that a CUDA graph must not replay it.

    What is left is the norm of weight - first * second, relative to the weight's (absolute where the weight is zero), in
    float64: of all of it where there are at most 32 channels on each side, else estimated from 8 sums of the channels of a
    larger side, with random signs (`noise.signs`). Not differentiable.

    Args:
        equations: one or more, of one dtype on one device; each has the arguments of `direct`, with a seed for each item.
        density, precision: as in `direct`.
        limit: a residual that counts as exact.

    Returns:
        Both kernels of each equation, as `direct` returns them; of all items in order (3, items) float64: the residual, zero
        (the steps of a closed form), and the largest magnitude in the weight, NaN where it has one; and (items,) bool, whether
        the residual is within `limit`.

    Raises:
        TypeError, ValueError: as `direct` does; dtypes or devices differ; a weight has no channels; seeds are not as many as
            items; there is no equation.
    """
    if not equations:
        raise ValueError("direct_many needs one equation or more.")
    given = [Equation(*one) for one in equations]
    like = given[0].weight
    for number, one in enumerate(given):
        weight, hidden, k1, k2, before, seeds, into_first = one
        check_equation(weight, hidden, k1, k2, before, density, precision, into_first)
        if weight.dtype != like.dtype or weight.device != like.device:
            raise TypeError(
                f"direct_many needs weights of one dtype on one device, but weight 0 has {like.dtype} on {like.device} and "
                f"weight {number} {weight.dtype} on {weight.device}: call it for each kind."
            )
        if 0 in weight.shape[1:3] or len(seeds) != len(weight):
            raise ValueError(
                f"weight {number} has shape {tuple(weight.shape)} and {len(seeds)} seeds: it needs channels on both sides, and "
                "a seed for each item."
            )
    out = _direct_many_op(
        [one.weight for one in given],
        [one.hidden_channels for one in given],
        [n for one in given for n in three(one.k1, 1)],
        [n for one in given for n in three(one.k2, 1)],
        [n for one in given for n in three(one.before)],
        [seed for one in given for seed in one.seeds],
        [one.into_first for one in given],
        density,
        precision,
        limit,
    )
    *kernels, told, exact = out
    return list(zip(kernels[0::2], kernels[1::2], strict=True)), told, exact


def _allocate(
    weights: Sequence[Tensor],
    hidden: Sequence[int],
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    seeds: Sequence[int],
    into_first: Sequence[bool],
    density: float,
    precision: str,
    limit: float,
) -> list[Tensor]:
    out = []
    for n, weight in enumerate(weights):
        (batch, co, ci), sizes = weight.shape[:3], slice(3 * n + 6 - weight.ndim, 3 * n + 3)
        out += [weight.new_empty((batch, hidden[n], ci, *k1[sizes])), weight.new_empty((batch, co, hidden[n], *k2[sizes]))]
    items = len(seeds)
    told = weights[0].new_empty((3, items), dtype=torch.float64)
    return [*out, told, weights[0].new_empty(items, dtype=torch.bool)]


def _launch(
    out: list[Tensor],
    weights: Sequence[Tensor],
    hidden: Sequence[int],
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    seeds: Sequence[int],
    into_first: Sequence[bool],
    density: float,
    precision: str,
    limit: float,
) -> None:
    if not seeds:  # an empty grid is an error
        return
    from .launch import Estimate, One, launch_direct_many

    *kernels, told, exact = out
    ones = [
        One(weight, kernels[2 * n], kernels[2 * n + 1], before[3 * n : 3 * n + 3], into_first[n])
        for n, weight in enumerate(weights)
        if len(weight)
    ]
    launch_direct_many(ones, seeds, told, exact, density, precision, Estimate(SUMS, FEW, limit))


def _plain(
    out: list[Tensor],
    weights: Sequence[Tensor],
    hidden: Sequence[int],
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    seeds: Sequence[int],
    into_first: Sequence[bool],
    density: float,
    precision: str,
    limit: float,
) -> None:
    *kernels, told, exact = out
    item = 0
    for n, weight in enumerate(weights):
        first, second, zeros = kernels[2 * n], kernels[2 * n + 1], before[3 * n : 3 * n + 3]
        items = slice(item, item + len(weight))
        keys = np.array(seeds[items], np.int64).view(np.uint64)
        # Queued: a scale that is infinite passes as a tensor.
        options: dict[str, Any] = {"density": density, "into_first": into_first[n], "queued": True}
        fill_plainly((first, second), weight, zeros[6 - weight.ndim :], keys, **options)
        told[0, items] = _residual(six_dimensional(weight), six_dimensional(first), six_dimensional(second), zeros)
        told[2, items] = weight.double().flatten(1).abs().amax(1) if len(weight) else 0.0
        item = items.stop
    told[1] = 0.0
    exact.copy_(told[0] <= limit)


def _residual(weight: Tensor, first: Tensor, second: Tensor, before: Sequence[int]) -> Tensor:
    """What is left of each item, (B,), as `direct_many` says."""
    norm = weight.double().flatten(1).norm(dim=1)
    target = _added_up(_added_up(weight.double(), 2), 1)
    left = compose_torch(_added_up(first.double(), 2), _added_up(second.double(), 1)).neg_()
    box: tuple[Any, ...] = tuple(slice(start, start + size) for start, size in zip(before, weight.shape[3:], strict=True))
    left[(..., *box)] += target
    residual: Tensor = left.flatten(1).norm(dim=1) / norm.masked_fill(norm == 0, 1.0)
    return residual


def _added_up(kernel: Tensor, dim: int) -> Tensor:
    """Channels of a dimension added up with their signs, where they are many."""
    channels = kernel.shape[dim]
    if channels <= FEW:
        return kernel
    signed = kernel * signs(channels).to(kernel.device).view(-1, *(1,) * (kernel.ndim - 1 - dim))
    signed = torch.nn.functional.pad(signed, [0, 0] * (kernel.ndim - 1 - dim) + [0, -channels % SUMS])
    return signed.view(*kernel.shape[:dim], -1, SUMS, *kernel.shape[dim + 1 :]).sum(dim)


_direct_many_op: Any = register("direct_many", allocate=_allocate, launch=_launch, plain=_plain)
