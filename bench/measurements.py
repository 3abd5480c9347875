"""What is claimed: ratios between the contenders of a suite, taken in one run, and the targets they are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """The time of `over` divided by the time of `under`, medians of all rounds, per unit of work.

    Attributes:
        suite: the suite that both contenders run in.
        case: what the ratio says.
        over: contender whose time is divided.
        under: contender whose time divides.
        at_least: smallest ratio that meets the target; at most one of the two is given.
        at_most: largest ratio that meets the target.
    """

    suite: str
    case: str
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str | None:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return None if self.at_most is None else f"<= {self.at_most:g}"

    def met(self, ratio: float) -> bool | None:
        if self.at_least is not None:
            return ratio >= self.at_least
        return None if self.at_most is None else ratio <= self.at_most


MEASUREMENTS = (
    Measurement("half-step", "half-step, float64: numpy / torch", "numpy", "torch float64", at_least=8),
    Measurement("half-step", "half-step, float32: numpy (float64) / torch", "numpy", "torch float32"),
    Measurement("half-step", "Auto, float64: numpy's half-step / closed form", "numpy", "auto float64", at_least=300),
    Measurement("half-step", "Auto, float32: numpy's half-step (float64) / closed form", "numpy", "auto float32"),
    Measurement("scaling", "Auto's time per weight entry: C = 256 / C = 64", "C=256", "C=64", at_most=1.5),
    Measurement("batch", "64 small equations: one by one / in one call", "loop", "batch"),
)


@dataclass(frozen=True)
class Measured:
    """A measurement with its figures.

    Attributes:
        measurement: what was measured.
        medians: seconds of one run of each contender, median of all rounds of all visits.
        ratio: of the medians, per unit of work.
        spread: smallest and largest ratio of one visit's medians.
        residual: the larger of the two contenders' relative residuals; None where neither has one.
    """

    measurement: Measurement
    medians: dict[str, float]
    ratio: float
    spread: tuple[float, float]
    residual: float | None


def measure(report: dict[str, Any]) -> list[Measured]:
    """The figures of all measurements from the JSON that pytest-benchmark wrote."""
    return [_measure(m, [run for run in report["benchmarks"] if run["group"] == m.suite]) for m in MEASUREMENTS]


def _measure(measurement: Measurement, runs: Sequence[dict[str, Any]]) -> Measured:
    def visits(name: str) -> list[dict[str, Any]]:
        chosen = [run for run in runs if run["extra_info"]["contender"] == name]
        return sorted(chosen, key=lambda run: run["extra_info"]["visit"])

    over, under = visits(measurement.over), visits(measurement.under)
    medians, work = {}, {}
    for name, taken in ((measurement.over, over), (measurement.under, under)):
        medians[name] = median([t for run in taken for t in run["stats"]["data"]])
        work[name] = taken[0]["extra_info"]["work"]
    share = work[measurement.under] / work[measurement.over]
    ratios = [share * a["stats"]["median"] / b["stats"]["median"] for a, b in zip(over, under, strict=True)]
    return Measured(
        measurement,
        medians,
        ratio=share * medians[measurement.over] / medians[measurement.under],
        spread=(min(ratios), max(ratios)),
        residual=max(run["extra_info"]["residual"] for run in (*over, *under)),
    )


def table(measured: Sequence[Measured], *, judged: bool = True) -> str:
    """One line a measurement, with a verdict where it is `judged`."""
    verdicts = {None: "", True: "met", False: "MISSED"}
    head = ("suite", "ratio of medians", "ratio", "visits", "target", "", "residual")
    lines = [
        (
            m.measurement.suite,
            m.measurement.case,
            f"{m.ratio:.3g}",
            f"{m.spread[0]:.3g} to {m.spread[1]:.3g}",
            m.measurement.target or "none",
            verdicts[m.measurement.met(m.ratio)] if judged else "",
            "" if m.residual is None else f"{m.residual:.1e}",
        )
        for m in measured
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    numeric = (False, False, True, True, True, False, True)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in (head, *lines)
    )
