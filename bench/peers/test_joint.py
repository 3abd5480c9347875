"""General on a small joint problem below Claim 1, against scipy's least_squares with the problem's exact Jacobian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import decomposing, worst_residual
from bench.race import Contender

TAPS = 3
HIDDEN = {4: 7, 8: 14}


def drawn(channels: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((channels, channels, 5, 5))


def split(unknowns: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.split(unknowns, 2)
    return first.reshape(-1, channels, TAPS, TAPS), second.reshape(channels, -1, TAPS, TAPS)


def composed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    found = np.zeros((len(second), first.shape[1], 2 * TAPS - 1, 2 * TAPS - 1))
    for a, b in np.ndindex(TAPS, TAPS):
        found[:, :, a : a + TAPS, b : b + TAPS] += np.einsum("oh,hiyx->oiyx", second[:, :, a, b], first)
    return found


def jacobian(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of all equations, (o, i, y, x), by all unknowns: first (h, i, y, x), then second (o, h, y, x)."""
    shape = composed(first, second).shape
    by_first = np.zeros((*shape, *first.shape))
    by_second = np.zeros((*shape, *second.shape))
    channels = np.arange(len(second))
    for a, b in np.ndindex(TAPS, TAPS):
        for c, d in np.ndindex(TAPS, TAPS):
            for i in channels:
                by_first[:, i, a + c, b + d, :, i, c, d] += second[:, :, a, b]
                by_second[i, :, a + c, b + d, i, :, a, b] += first[:, :, c, d].T
    equations = len(channels) ** 2 * (2 * TAPS - 1) ** 2
    return np.concatenate([by_first.reshape(equations, -1), by_second.reshape(equations, -1)], axis=1)


def by_scipy(weight: np.ndarray) -> Any:
    from scipy.optimize import least_squares

    channels = len(weight)
    start = np.random.default_rng(1).standard_normal(2 * HIDDEN[channels] * channels * TAPS * TAPS)
    found = least_squares(
        lambda u: (composed(*split(u, channels)) - weight).ravel(),
        start,
        lambda u: jacobian(*split(u, channels)),
        ftol=1e-12,
    )
    return split(found.x, channels)


def ours(weight: np.ndarray) -> Any:
    given, hidden = torch.from_numpy(weight), HIDDEN[len(weight)]
    answer = fm.decompose(given, hidden, (3, 3), solver=fm.General(), generator=0, allow_inexact=True)
    return answer.first.numpy(), answer.second.numpy()


def contender(way: str, channels: int) -> Contender:
    weight, run = drawn(channels), by_scipy if way == "scipy" else ours
    return Contender(
        run=lambda: run(weight),
        residual=lambda found: worst_residual(weight, *found),
        tolerance=1e-6,
        rounds=1 if way == "scipy" else 5,
        job=decomposing(torch.from_numpy(weight), HIDDEN[channels], (TAPS, TAPS)),
        single=way == "scipy" and channels > 4,
        asks="residuals and Jacobian written out" if way == "scipy" else "a weight",
    )


@pytest.mark.contenders("scipy, 4", "fastmorph, 4")
def test_joint(race: Race, name: str) -> None:
    way, _, channels = name.partition(", ")
    race("joint", contender(way, int(channels)))


@pytest.mark.contenders(LARGE := ["scipy, 8", "fastmorph, 8"], slow=LARGE, visits=1)
def test_larger_joint(race: Race, name: str) -> None:
    """Of scipy one run, which takes minutes."""
    way, _, channels = name.partition(", ")
    race("joint", contender(way, int(channels)))
