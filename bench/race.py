"""How a contender is timed: its answer is checked first, then it runs in turn with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.floors import Job
from bench.peak import peak_of

VISITS = 5  # contenders take turns, so that a slow spell of the machine falls on all of them


@dataclass(frozen=True)
class Contender:
    """One way to do the work that a suite compares.

    Attributes:
        run: does the work once and returns its answer.
        residual: how far an answer is from the exact one; raises AssertionError for one of another kind.
        tolerance: largest residual that counts as exact.
        rounds: timed runs in each visit.
        job: what is done, for its floor; contenders of one ratio may do it in other dtypes and sizes.
        work: units of work in one run, where contenders do different amounts and times are compared per unit.
        setup: makes the arguments of `run`, before each run and outside its time.
        once: whether the answer is checked on the first visit alone: for work that always gives the same, and takes long.
        single: whether there is but one run at all, whose answer is checked behind it: for what takes minutes.
        asks: what it asks of the user's model, for peers.
    """

    run: Callable[..., Any]
    residual: Callable[[Any], float]
    tolerance: float
    rounds: int
    job: Job
    work: int = 1
    setup: Callable[[], tuple[Any, ...]] = tuple
    once: bool = False
    single: bool = False
    asks: str = ""


def time_exact(benchmark: Any, suite: str, name: str, visit: int, contender: Contender, *, quick: bool) -> None:
    """Time one visit of a contender, unless its answer is not exact: then fail."""
    job = contender.job
    benchmark.group = suite
    benchmark.extra_info.update(
        contender=name,
        visit=visit,
        work=contender.work,
        shape=job.shape,
        dtype=job.dtype,
        floor=job.floor(),
        asks=contender.asks,
    )

    def check(answer: Any) -> None:
        residual = contender.residual(answer)
        assert residual <= contender.tolerance, (
            f"{suite}, {name}: residual {residual:.1e}, exact means at most {contender.tolerance:.1e}; not timed"
        )
        benchmark.extra_info.update(residual=residual)

    if contender.single:
        check(benchmark.pedantic(contender.run, rounds=1))
        return
    if visit == 0 or not contender.once:
        check(contender.run(*contender.setup()))
    if visit == 0:
        given = contender.setup()
        benchmark.extra_info.update(peak=peak_of(lambda: contender.run(*given)))
        del given
    benchmark.pedantic(
        contender.run,
        setup=lambda: (contender.setup(), {}),
        rounds=1 if quick else contender.rounds,
        warmup_rounds=0 if quick or contender.once else 1,
    )
