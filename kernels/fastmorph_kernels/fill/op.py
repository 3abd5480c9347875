"""Filling many grown tensors as a registered operator, and the validated function in front of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..register import register
from ..support import DTYPES
from .plain import fill_torch
from .table import BITS, CONSTANT, DRAWN, OLD, Dimension, flat, growths, shape_of, table_of


def fill(
    sources: Sequence[Tensor], dimensions: Sequence[Sequence[Dimension]], first: Sequence[int] | None = None
) -> list[Tensor]:
    """Write many tensors that grow, in one launch for all of one dtype and device, each entry once.

    An entry is one of the source, noise, negated noise or a constant, then divided or moved by noise that sums to zero over
    copies: see `Dimension`. Every step is rounded to the tensor's dtype; products and quotients are taken in float32, those of
    float64 tensors in float64. Not differentiable; not for CUDA graphs, which would replay the table of the first call.

    Args:
        sources: any shapes and strides, one to five dimensions; float64, float32, bfloat16 or float16.
        dimensions: of each source those that grow, in the order in which they are filled, one at least.
        first: of each source the dimension that noise is counted through first, before the others in their order; -1, or None
            for all: in their order.

    Returns:
        The outputs, contiguous, of the sources' dtypes and on their devices.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: the lists differ in length, a dimension is not there or grows twice, or arrays differ in size.
        IndexError: an index is not in its source.
    """
    order = [-1] * len(sources) if first is None else first
    if not len(sources) == len(dimensions) == len(order):
        raise ValueError(
            f"fill needs dimensions and what is first for each source, but there are {len(sources)} sources, "
            f"{len(dimensions)} lists of dimensions and {len(order)} numbers."
        )
    for k, (source, grown, leader) in enumerate(zip(sources, dimensions, order, strict=True)):
        _check(k, source, grown, leader)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, source in enumerate(sources):
        groups.setdefault((source.dtype, source.device), []).append(k)
    out: dict[int, Tensor] = {}
    for members in groups.values():
        found = _fill_op([sources[k] for k in members], *flat((order[k], dimensions[k]) for k in members))
        out.update(zip(members, found, strict=True))
    return [out[k] for k in range(len(sources))]


def _check(k: int, source: Tensor, grown: Sequence[Dimension], first: int) -> None:
    if source.dtype not in DTYPES:
        raise TypeError(f"fill cannot take source {k}, of {source.dtype}: convert it to float32, float64, bfloat16 or float16.")
    dims = [given.dim for given in grown]
    if not dims or len(set(dims)) < len(dims) or not all(0 <= dim < source.ndim for dim in dims):
        raise ValueError(f"fill needs dimensions of source {k}, {source.ndim} in all, once each, but these grow: {dims}.")
    if not -1 <= first < source.ndim:
        raise ValueError(f"what is first of source {k} must be -1 or one of its {source.ndim} dimensions, but it is {first}.")
    for given in grown:
        arrays = (given.kind, given.place, given.row, given.divisor, given.balance)
        if len({array.shape for array in arrays if array is not None}) > 1:
            raise ValueError(f"fill needs arrays of one size for dimension {given.dim} of source {k}.")
        if max(source.shape[given.dim], len(given.kind)) > 2**BITS:
            raise ValueError(f"dimension {given.dim} of source {k} is too long: 2^30 indices are the most.")
        limits = ((given.kind == OLD, source.shape[given.dim]), ((given.kind >= DRAWN) & (given.kind < CONSTANT), given.drawn))
        for places, limit in ((given.place[chosen], limit) for chosen, limit in limits):
            if len(places) and not 0 <= places.min() <= places.max() < limit:
                raise IndexError(
                    f"places of dimension {given.dim} of source {k} run from {places.min()} to {places.max()}, but must stay "
                    f"between 0 and {limit - 1}."
                )


def _allocate(sources: Sequence[Tensor], words: Tensor, numbers: Sequence[int], factors: Sequence[float]) -> list[Tensor]:
    """All sources of one dtype and device; words on the CPU, see `table.flat`."""
    return [source.new_empty(shape_of(source, growth)) for source, growth in zip(sources, growths(numbers), strict=True)]


def _launch(
    out: list[Tensor], sources: Sequence[Tensor], words: Tensor, numbers: Sequence[int], factors: Sequence[float]
) -> None:
    if not any(tensor.numel() for tensor in out):  # an empty grid is an error
        return
    from .kernel import config_for, launch_fill

    config = config_for(out[0])
    table = table_of(sources, out, words, numbers, factors, config.block)
    if out[0].is_cuda:  # a copy that the host does not wait for
        table = table._replace(numbers=table.numbers.pin_memory().to(out[0].device, non_blocking=True))
    launch_fill(out[0], table, config)


def _plain(
    out: list[Tensor], sources: Sequence[Tensor], words: Tensor, numbers: Sequence[int], factors: Sequence[float]
) -> None:
    at = 0
    for tensor, source, growth in zip(out, sources, growths(numbers), strict=True):
        count = len(growth.dimensions)
        fill_torch(tensor, source, growth, words, factors[2 * at : 2 * (at + count)])
        at += count


_fill_op = register("fill", allocate=_allocate, launch=_launch, plain=_plain)
