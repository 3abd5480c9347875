"""Results as they come: printed at once, added to the ledger at once where they count, and in a table at the end."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.ledger import append, figures, provenance
from bench.measurements import Measured, Measurement, table


@dataclass
class Report:
    """What a run has found out.

    Attributes:
        minutes: after so many no section is begun.
        record: whether results are added to the ledger.
        judged: whether figures mean anything.
    """

    minutes: float
    record: bool = False
    judged: bool = True
    measured: list[Measured] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.began)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What all rows of the ledger have in common."""
        return provenance(_processor(), torch.get_num_threads())

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def add(self, measured: Measured, *, kept: bool = True) -> None:
        """Take a result down, in the ledger too where it is `kept`."""
        m = measured.measurement
        met = m.met(measured.ratio)
        verdict = "" if met is None or not self.judged else ", met" if met else ", MISSED"
        self.measured.append(measured)
        self.say(f"{m.case}: {measured.ratio:.3g}" + (f" ({m.target}{verdict})" if m.target else ""))
        if self.record and kept:
            append([self.shared | figures(measured)])

    def check(self, case: str, error: float, bound: float | None, *, kept: bool = False) -> None:
        """An error that must not be above its bound, or is only told where there is none; its row has it as the residual."""
        if not math.isfinite(error):
            self.fail(f"{case}: {error}")
            return
        share = error if bound is None else error / bound
        measurement = Measurement("gpu check", case, "error", "bound" if bound else "1", at_most=None if bound is None else 1)
        self.add(Measured(measurement, {}, share, (share, share), error), kept=kept)
        if bound is not None and not error <= bound:
            self.fail(f"{case}: {error:.2e}, which must be at most {bound:.2e}")

    def hold(self, case: str, wrong: int) -> None:
        """A count of things that must not be."""
        self.add(Measured(Measurement("gpu check", case, "wrong", "1", at_most=0), {}, wrong, (wrong, wrong), None), kept=False)
        if wrong:
            self.fail(f"{case}: {wrong} wrong")

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED  {text}")

    def skip(self, what: str) -> None:
        """Name what cannot run here."""
        self.say(f"skipped here: {what}")

    def run(self, sections: Iterable[tuple[str, Callable[[], None]]], after: Callable[[], None]) -> None:
        """Run one section after another: what one of them breaks the others still tell. `after` follows each."""
        for name, section in sections:
            if self.left <= 0:
                self.fail(f"{name}: not begun, {self.minutes:g} minutes are over; run it by --only {name}")
                continue
            self.say(f"-- {name}")
            try:
                section()
            except Exception as error:  # whatever it was is told in full, and is a failure of the run
                traceback.print_exc(file=sys.stdout)
                self.fail(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            after()

    def close(self) -> int:
        """Print the table and the failures; the exit status."""
        if self.measured:
            print(table(self.measured, judged=self.judged))
        for failure in self.failures:
            print(f"FAILED  {failure}", flush=True)
        return 1 if self.failures else 0


def _processor() -> str | None:
    """The name of the CPU, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
