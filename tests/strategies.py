"""Hypothesis strategies for equations, and the oracle's view of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastmorph.equation import reference
from fastmorph.equation.frame import Frame, make_frame, tap_count


@dataclass(frozen=True)
class Case:
    weight: torch.Tensor
    frame: Frame
    dims: int

    @property
    def sizes(self):
        return (self.frame.first, self.frame.second) if self.dims else (1, 1)

    @property
    def channels(self):
        cut = self.weight.ndim - self.dims - 2
        return self.weight.shape[cut], self.weight.shape[cut + 1]


@st.composite
def cases(draw, dtype=torch.float64, max_channels=6, fits_first=None):
    """Weights (*B, Co, Ci, *K) with two kernel sizes whose frame holds them, in any number of dimensions."""
    dims = draw(st.integers(0, 3))
    k = tuple(draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims))
    low = 0 if fits_first else -2
    k1 = tuple(max(1, n + draw(st.integers(low, 1))) for n in k)
    k2 = tuple(max(n - m + 1, draw(st.integers(1, 3))) for n, m in zip(k, k1, strict=True))
    batch = draw(st.sampled_from([(), (), (1,), (3,), (2, 2)]))
    co, ci = draw(st.integers(1, max_channels)), draw(st.integers(1, max_channels))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(*batch, co, ci, *k, generator=generator, dtype=torch.float64).to(dtype)
    return Case(weight, make_frame(k, (k1, k2)) if dims else Frame((), (), ()), dims)


def _items(case: Case, first, second):
    numpy = [np.asarray(t.to(torch.float64)) for t in (case.weight, first, second)]
    cut = case.weight.ndim - case.dims - 2
    return list(zip(*(a.reshape(-1, *a.shape[cut:]) for a in numpy), strict=True))


def oracle_residual(case: Case, first, second) -> float:
    """Largest relative residual over the batch, by the numpy reference in float64."""
    return max(
        reference.relative_residual(reference.pad_to_frame(weight, case.frame), one, two)
        for weight, one, two in _items(case, first, second)
    )


def agrees(case: Case, first, second):
    """What a residual told must be: the oracle's, within what two float64 measurements of it can differ by.

    A composition of n products is off by n u |F2| * |F1| at most, in each of the two.
    """
    slack = 0.0
    for weight, one, two in _items(case, first, second):
        terms = one.shape[0] * tap_count(case.frame.second)
        bound = terms * np.finfo(float).eps * np.linalg.norm(reference.compose(abs(one), abs(two)))
        slack = max(slack, bound / (np.linalg.norm(weight) or 1.0))
    return pytest.approx(oracle_residual(case, first, second), rel=1e-6, abs=slack)
