"""How far an answer is from the weight that it must compose to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
