"""How a contender is timed: its answer is checked first, then it runs in turn with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmorph.equation import reference
from fastmorph.equation.frame import make_frame

VISITS = 5  # contenders take turns, so that a slow spell of the machine falls on all of them


@dataclass(frozen=True)
class Contender:
    """One way to do the work that a suite compares.

    Attributes:
        run: does the work once and returns its answer.
        kernels: the answer's F1 (*B, Ch, Ci, *K1) and F2 (*B, Co, Ch, *K2) as arrays.
        weight: G (*B, Co, Ci, *K) that they must compose to.
        tolerance: largest relative residual that counts as exact.
        rounds: timed runs in each visit.
        work: units of work in one run, where contenders do different amounts and times are compared per unit.
    """

    run: Callable[[], Any]
    kernels: Callable[[Any], tuple[Any, Any]]
    weight: Any
    tolerance: float
    rounds: int
    work: int = 1


def time_exact(benchmark: Any, suite: str, name: str, visit: int, contender: Contender, *, quick: bool) -> None:
    """Time one visit of a contender, unless its answer is not exact: then fail."""
    residual = worst_residual(contender.weight, *contender.kernels(contender.run()))
    assert residual <= contender.tolerance, (
        f"{suite}, {name}: relative residual {residual:.1e}, exact means at most {contender.tolerance:.1e}; not timed"
    )
    benchmark.group = suite
    benchmark.extra_info.update(contender=name, visit=visit, work=contender.work, residual=residual)
    benchmark.pedantic(contender.run, rounds=1 if quick else contender.rounds, warmup_rounds=0 if quick else 1)


def worst_residual(weight: Any, first: Any, second: Any) -> float:
    """Largest ||G - F2 * F1|| / ||G|| of a batch of 2-d kernels, by the numpy oracle in float64."""
    wide = [np.asarray(array, dtype=np.float64) for array in (weight, first, second)]
    items: list[NDArray[np.float64]] = [array.reshape(-1, *array.shape[-4:]) for array in wide]
    worst = 0.0
    for g, f1, f2 in zip(*items, strict=True):
        frame = make_frame(g.shape[2:], (f1.shape[2:], f2.shape[2:]))
        worst = max(worst, reference.relative_residual(reference.pad_to_frame(g, frame), f1, f2))
    return worst
