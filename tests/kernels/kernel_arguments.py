"""Small arguments for every operator, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from fastmorph_kernels.fill.table import CONSTANT, DRAWN, MIRRORED, OLD, Dimension, flat
from kernel_oracle import random

Arguments = tuple[Any, ...]


def _direct(batch: int, held: int, hidden: int, *, into_first: bool = True, measured: bool = False) -> Arguments:
    weight, spread = random(batch, held, 3, 2), None if measured else torch.ones(batch)
    return weight, hidden, [3], [2], [1], torch.arange(batch), spread, 1.0, "ieee", into_first


def _direct_many() -> Arguments:
    weights = [random(2, 5, 3, 2), random(2, 2, 33, 2)]  # pairs to spare, and shared ones into the second kernel
    sizes = [1, 1, 3, 1, 1, 2], [1, 1, 2, 1, 1, 3], [0, 0, 1, 0, 0, 1]
    return weights, [12, 34], *sizes, [1, 2, 3, 4], [True, False], 1.0, "ieee", 0.0


def _fill() -> Arguments:
    kind, place = np.array([OLD, DRAWN, MIRRORED, OLD, CONSTANT, OLD]), np.array([0, 0, 0, 1, 0, 2])
    rows = Dimension(0, kind, place, np.where(kind == MIRRORED, 1, place), 1, 7, 0.5, leads=True)
    columns = replace(rows, dim=1, key=8, sign=-1, leads=False, follows=True, divisor=np.array([1, 1, 1, 2, 1, 1]))
    return [random(3, 3, 2), random(3)], *flat([(0, [columns, rows]), (-1, [rows])])


# The operator is what stands before a comma. Two items and two taps at least, so that every stride counts.
ARGUMENTS: dict[str, Callable[[], Arguments]] = {
    "compose": lambda: (random(2, 3, 5, 2), random(2, 4, 3, 3), "ieee"),
    "correlate": lambda: (random(2, 4, 5, 2), [1], random(2, 3, 5, 2), [3], "ieee"),
    "residual": lambda: (random(2, 3, 5, 2), random(2, 4, 3, 3), random(2, 4, 5, 2), [1], "ieee"),
    "row_gram": lambda: (random(2, 3, 5, 2), [2], "ieee"),
    "column_gram": lambda: (random(2, 5, 3, 2), [2], "ieee"),
    "anderson_gram": lambda: (random(2, 3, 40), random(2, 40), torch.float64),
    "anderson_update": lambda: (random(2, 40), random(2, 3, 40), random(2, 3)),
    "fill": _fill,
    "direct": lambda: _direct(1, 5, 12),
    "direct, shared pairs": lambda: _direct(1, 66, 69),
    "direct, spread of the weight": lambda: _direct(2, 5, 12, measured=True),
    "direct_many": _direct_many,
    "direct, into second": lambda: _direct(2, 2, 9, into_first=False),
}


def outputs(result: Any) -> list[torch.Tensor]:
    """What an operator returns, as a list."""
    return [result] if isinstance(result, torch.Tensor) else list(result)
