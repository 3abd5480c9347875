"""How far an answer is from the weight that it must compose to, and what decomposing takes at least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.floors import Job
from fastmorph.equation import reference
from fastmorph.equation.frame import make_frame


def worst_residual(weight: Any, first: Any, second: Any) -> float:
    """Largest ||G - F2 * F1|| / ||G|| of a batch of 2-d kernels, by the numpy oracle in float64.

    Args:
        weight: G (*B, Co, Ci, *K).
        first: F1 (*B, Ch, Ci, *K1).
        second: F2 (*B, Co, Ch, *K2).
    """
    wide = [np.asarray(array, dtype=np.float64) for array in (weight, first, second)]
    items: list[NDArray[np.float64]] = [array.reshape(-1, *array.shape[-4:]) for array in wide]
    worst = 0.0
    for g, f1, f2 in zip(*items, strict=True):
        frame = make_frame(g.shape[2:], (f1.shape[2:], f2.shape[2:]))
        worst = max(worst, reference.relative_residual(reference.pad_to_frame(g, frame), f1, f2))
    return worst


def decomposing(weight: Tensor, hidden: int, sizes: Sequence[int], operations: Mapping[str, float] | None = None) -> Job:
    """Reading a 2-d weight (*B, Co, Ci, K, K) and writing two kernels of these sizes, and what its solver must compute."""
    *batch, co, ci = weight.shape[:-2]
    entries = weight.numel() + prod(batch) * hidden * (ci * sizes[0] ** 2 + co * sizes[1] ** 2)
    shape = f"{'x'.join(map(str, weight.shape))} -> {hidden} between {sizes[0]}x{sizes[0]} and {sizes[1]}x{sizes[1]}"
    return Job(shape, str(weight.dtype).removeprefix("torch."), entries * weight.itemsize, operations or {})


def half_step_operations(co: int, ci: int, size: int, dtype: str) -> dict[str, float]:
    """Of the normal equations' Cholesky factor and its two triangular solves, with ci * size**2 equations a channel."""
    equations = ci * size**2
    return {dtype: equations**3 / 3 + 2 * equations**2 * co}
