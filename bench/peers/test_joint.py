"""General on a small joint problem below Claim 1, against scipy's least_squares with the problem's exact Jacobian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import worst_residual
from bench.race import Contender

CHANNELS, HIDDEN, TAPS = 4, 7, 3
WEIGHT = np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS, 5, 5))
START = np.random.default_rng(1).standard_normal(2 * HIDDEN * CHANNELS * TAPS * TAPS)


def split(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.split(unknowns, 2)
    return first.reshape(HIDDEN, CHANNELS, TAPS, TAPS), second.reshape(CHANNELS, HIDDEN, TAPS, TAPS)


def composed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    found = np.zeros_like(WEIGHT)
    for a, b in np.ndindex(TAPS, TAPS):
        found[:, :, a : a + TAPS, b : b + TAPS] += np.einsum("oh,hiyx->oiyx", second[:, :, a, b], first)
    return found


def jacobian(unknowns: np.ndarray) -> np.ndarray:
    """Of all equations, (o, i, y, x), by all unknowns: first (h, i, y, x), then second (o, h, y, x)."""
    first, second = split(unknowns)
    by_first = np.zeros((*WEIGHT.shape, *first.shape))
    by_second = np.zeros((*WEIGHT.shape, *second.shape))
    channels = np.arange(CHANNELS)
    for a, b in np.ndindex(TAPS, TAPS):
        for c, d in np.ndindex(TAPS, TAPS):
            for i in channels:
                by_first[:, i, a + c, b + d, :, i, c, d] += second[:, :, a, b]
                by_second[i, :, a + c, b + d, i, :, a, b] += first[:, :, c, d].T
    return np.concatenate([by_first.reshape(WEIGHT.size, -1), by_second.reshape(WEIGHT.size, -1)], axis=1)


def by_scipy() -> Any:
    from scipy.optimize import least_squares

    return split(least_squares(lambda u: (composed(*split(u)) - WEIGHT).ravel(), START, jacobian, ftol=1e-12).x)


def ours() -> Any:
    weight = torch.from_numpy(WEIGHT)
    answer = fm.decompose(weight, HIDDEN, (3, 3), solver=fm.General(), generator=0, allow_inexact=True)
    return answer.first.numpy(), answer.second.numpy()


@pytest.mark.contenders("scipy", "fastmorph")
def test_joint(race: Race, name: str) -> None:
    run = by_scipy if name == "scipy" else ours
    race("joint", Contender(run, lambda found: worst_residual(WEIGHT, *found), 1e-6, rounds=1 if name == "scipy" else 5))
