"""Grown tensors written together: on a GPU many of them by one launch, elsewhere one after the other, with the same bits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fastmorph.equation.backends import why_unavailable
from fastmorph.morphs.widen_write import Side, leading, write

if TYPE_CHECKING:
    from fastmorph_kernels.fill import Dimension


class Writing(NamedTuple):
    """A tensor to be written: the arguments of `write`."""

    old: Tensor
    sides: Sequence[Side]
    scale: float


def is_launched(old: Tensor, backend: str | None) -> bool:
    """Whether a kernel writes what grows out of a tensor: for `backend` "triton", and for None on a GPU, where it can run."""
    chosen = backend == "triton" or (backend is None and old.device.type == "cuda")
    plain = type(old) in (Tensor, nn.Parameter)  # others have their memory elsewhere, or none
    return chosen and plain and why_unavailable(old) is None


def write_all(writings: Sequence[Writing], backend: str | None) -> list[Tensor]:
    """The new tensors, by one launch for all of one dtype and device; what is standardised row by row is written by itself."""
    new: dict[int, Tensor] = {}
    together = [k for k, w in enumerate(writings) if is_launched(w.old, backend) and not any(s.standard for s in w.sides)]
    if together:
        orders = [leading(writings[k].old, writings[k].sides) for k in together]
        dimensions = [
            [_dimension(side, side is lead, writings[k].scale) for side in writings[k].sides]
            for k, (lead, _) in zip(together, orders, strict=True)
        ]
        found = _kernel().fill([writings[k].old for k in together], dimensions, [first for _, first in orders])
        new.update(zip(together, found, strict=True))
    return [new[k] if k in new else write(*writing) for k, writing in enumerate(writings)]


def _dimension(side: Side, leads: bool, scale: float) -> Dimension:
    """A side as the kernel takes it, index by index; what `write` puts last into an index counts."""
    kernel = _kernel()
    kind, place, row = (np.zeros(side.size, np.int64) for _ in range(3))
    divisor, balance = side.divisor, None
    numbers = np.arange(len(side.to))
    places = np.empty_like(numbers)
    places[side.of] = numbers
    kind[side.to], place[side.to], row[side.to] = kernel.OLD, side.of, numbers if leads else side.of
    if side.source is not None:
        kind[side.fresh], place[side.fresh] = kernel.OLD, side.source
        row[side.fresh] = places[side.source] if leads else side.source
        if leads and divisor is not None:  # copies of rows that are divided already
            divisor = divisor.copy()
            divisor[side.fresh] = divisor[side.to[places[side.source]]]
    if side.balanced is not None:
        balance = np.full(side.size, -1, np.int64)
        copies, each = side.balanced.shape
        balance[side.balanced] = (np.arange(copies)[:, None] << kernel.BITS) + np.arange(each)
    kind[side.drawn], place[side.drawn] = kernel.DRAWN, np.arange(len(side.drawn))
    kind[side.mirror], place[side.mirror] = kernel.MIRRORED, np.arange(len(side.mirror))
    row[side.mirror] = side.drawn[: len(side.mirror)]
    kind[side.rest] = kernel.CONSTANT
    dimension: Dimension = kernel.Dimension(
        side.dim,
        kind,
        place,
        row,
        drawn=len(side.drawn),
        key=side.noise.key,
        scale=scale,
        sign=-1 if side.reads else 1,
        value=side.value,
        leads=leads,
        follows=side.paired,
        divisor=divisor,
        balance=balance,
        copies=0 if side.balanced is None else len(side.balanced),
    )
    return dimension


def _kernel() -> Any:
    """The operator's module, at first use: the kernels' package is no part of `import fastmorph`."""
    return importlib.import_module("fastmorph_kernels.fill")
