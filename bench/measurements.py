"""What is claimed: ratios between the contenders of a suite, taken in one run, and the targets they are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np


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
    def names(self) -> tuple[str, ...]:
        return (self.over, self.under)

    @property
    def target(self) -> str | None:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return None if self.at_most is None else f"<= {self.at_most:g}"

    def met(self, ratio: float) -> bool | None:
        if self.at_least is not None:
            return ratio >= self.at_least
        return None if self.at_most is None else ratio <= self.at_most


@dataclass(frozen=True)
class Extrapolated(Measurement):
    """The same where `over` was timed on less work, and is taken to grow with a power of it: its `case` says so.

    Attributes:
        power: of the work.
    """

    power: float = 1.0


@dataclass(frozen=True)
class Exponent:
    """How the time of contenders grows with their units of work: the slope of a line through the logarithms of both.

    Attributes:
        suite: the suite that they run in.
        case: what the exponent says.
        contenders: two or more of different work.
        at_most: largest exponent that meets the target.
    """

    suite: str
    case: str
    contenders: tuple[str, ...]
    at_most: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.contenders

    @property
    def target(self) -> str | None:
        return None if self.at_most is None else f"<= {self.at_most:g}"

    def met(self, exponent: float) -> bool | None:
        return None if self.at_most is None else exponent <= self.at_most


@dataclass(frozen=True)
class Measured:
    """A measurement with its figures.

    Attributes:
        measurement: what was measured.
        medians: seconds of one run of each contender, median of all rounds of all visits.
        ratio: of the medians, per unit of work; or the exponent.
        spread: smallest and largest ratio of one visit's medians.
        residual: the largest of the contenders' relative residuals; None where none has one.
        residuals: the same for each contender, by name.
        peaks: bytes that one run of each contender held at most, on top of what was there before; see `bench.peak`.
        fifths: seconds of each contender below which a fifth and four fifths of its rounds are.
        floors: seconds that each contender's work takes at least, see `bench.floors`.
        shapes: of each contender's data.
        dtypes: of each contender's data.
        asks: what each contender asks of the user's model, where it is a peer.
    """

    measurement: Measurement | Exponent
    medians: dict[str, float]
    ratio: float
    spread: tuple[float, float]
    residual: float | None
    peaks: dict[str, int] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    fifths: dict[str, tuple[float, float]] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    asks: dict[str, str] = field(default_factory=dict)


def measure(report: dict[str, Any], measurements: Sequence[Measurement | Exponent]) -> list[Measured]:
    """The figures of measurements from the JSON that pytest-benchmark wrote."""
    runs = {m.suite: [run for run in report["benchmarks"] if run["group"] == m.suite] for m in measurements}
    there = {(suite, run["extra_info"]["contender"]) for suite, found in runs.items() for run in found}
    # A peer that is not installed has no runs.
    return [_measure(m, runs[m.suite]) for m in measurements if all((m.suite, name) in there for name in m.names)]


def _measure(measurement: Measurement | Exponent, runs: Sequence[dict[str, Any]]) -> Measured:
    names = measurement.names
    visits = {
        name: sorted(
            (run for run in runs if run["extra_info"]["contender"] == name), key=lambda run: run["extra_info"]["visit"]
        )
        for name in names
    }
    taken = [run["extra_info"] for name in names for run in visits[name]]
    rounds = {name: [t for run in visits[name] for t in run["stats"]["data"]] for name in names}
    medians = {name: median(seconds) for name, seconds in rounds.items()}
    work = [visits[name][0]["extra_info"]["work"] for name in names]

    def figure(seconds: Sequence[float]) -> float:
        if isinstance(measurement, Exponent):
            return float(np.polyfit(np.log(work), np.log(seconds), 1)[0])
        if isinstance(measurement, Extrapolated):
            return seconds[0] * (work[1] / work[0]) ** measurement.power / seconds[1]
        return seconds[0] / work[0] / (seconds[1] / work[1])

    each = [figure([run["stats"]["median"] for run in visit]) for visit in zip(*visits.values(), strict=True)]
    return Measured(
        measurement,
        medians,
        ratio=figure(list(medians.values())),
        spread=(min(each), max(each)),
        residual=max(info["residual"] for info in taken if "residual" in info),
        peaks={info["contender"]: info["peak"] for info in taken if info.get("peak") is not None},
        residuals={info["contender"]: info["residual"] for info in taken if "residual" in info},
        fifths={name: (float(np.quantile(t, 0.2)), float(np.quantile(t, 0.8))) for name, t in rounds.items()},
        floors={info["contender"]: info["floor"] for info in taken},
        shapes={info["contender"]: info["shape"] for info in taken},
        dtypes={info["contender"]: info["dtype"] for info in taken},
        asks={info["contender"]: info["asks"] for info in taken if info["asks"]},
    )


def table(measured: Sequence[Measured], *, judged: bool = True) -> str:
    """One line a measurement, with a verdict where it is `judged`."""
    verdicts = {None: "", True: "met", False: "MISSED"}
    head = ("suite", "ratio of medians", "ratio", "visits", "target", "", "residual", "times floor", "peak MB")
    lines = [
        (
            m.measurement.suite,
            m.measurement.case,
            f"{m.ratio:.3g}",
            f"{m.spread[0]:.3g} to {m.spread[1]:.3g}",
            m.measurement.target or "none",
            verdicts[m.measurement.met(m.ratio)] if judged else "",
            "" if m.residual is None else f"{m.residual:.1e}",
            _ends([f"{m.medians[name] / floor:.3g}" if floor else "-" for name, floor in m.floors.items()]),
            _ends([f"{peak / 1e6:.0f}" for peak in m.peaks.values()]),
        )
        for m in measured
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    numeric = (False, False, True, True, True, False, True, True, True)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in (head, *lines)
    )


def _ends(cells: Sequence[str]) -> str:
    """Of both contenders, or of the first and the last of many."""
    return (" / " if len(cells) < 3 else " to ").join([*cells[:1], *cells[1:][-1:]])
