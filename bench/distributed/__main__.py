"""Time equations divided between two ranks against one process; count the bytes that ranks send, and the peak of their memory.

Ranks are processes of this machine, a thread each, that talk by gloo over the loopback interface: on two cores, two ranks are
what can be shown. All figures are ratios; times are medians of rounds taken in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tqdm.auto import tqdm

from bench.distributed import work
from bench.ledger import append, provenance
from bench.processes import Processes
from fastmorph.cli.child import print_table

_ROUNDS = 7


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="append the results to the ledger")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"of the clock (default: {_ROUNDS})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        two = Processes(2, Path(folder))
        try:
            rows = [_times(two, options.rounds), _bytes(two), _memory(two)]
        finally:
            two.stop()
    print_table([("case", "ratio", "spread", "target", ""), *map(_told, rows)])
    if options.record:
        append(provenance(None, 1) | row for row in rows)
    return 0


def _times(two: Processes, rounds: int) -> dict[str, Any]:
    if not all(two.run(work.is_the_same)):
        raise AssertionError("the divided answers are not those of one process")
    times: dict[str, list[float]] = {"one process": [], "two ranks": []}
    runs = {"one process": work.alone, "two ranks": lambda: two.run(work.runs, None)}
    for _ in tqdm(range(rounds), unit="round"):
        for name, run in runs.items():
            began = perf_counter()
            run()
            times[name].append(perf_counter() - began)
    each = [one / both for one, both in zip(*times.values(), strict=True)]
    medians = {name: median(seconds) for name, seconds in times.items()}
    case = f"{work.EQUATIONS} half-steps, float64: one process / two ranks"
    return _row(case, medians["one process"] / medians["two ranks"], (min(each), max(each))) | {"median_s": medians}


def _bytes(two: Processes) -> dict[str, Any]:
    """Weights are on the first rank, and it wants the answers: what the second solves goes there and back."""
    sent = sum(two.run(work.bytes_sent))
    problems = work.problems()
    weight = problems[0].weight.nbytes
    kernels = 2 * work.HIDDEN * work.CHANNELS * 9 * problems[0].weight.itemsize
    needed = work.EQUATIONS // 2 * (weight + kernels)
    weights = work.EQUATIONS * weight
    case = "bytes that two ranks send / that the placement needs"
    return _row(case, sent / needed, (sent / needed,) * 2, at_most=1.1) | {"over_the_weights": sent / weights}


def _memory(two: Processes) -> dict[str, Any]:
    found = [answer for answer in two.run(work.growth) if answer[0] is not None]
    each = [(peak - own) / largest for peak, own, _, largest in found]
    whole = max(peak / whole for peak, _, whole, _ in found)
    case = "a rank's peak beside the child's shards / the largest parameter"
    return _row(case, max(each), (min(each), max(each)), at_most=5) | {"over_the_whole_child": whole}


def _row(case: str, ratio: float, spread: tuple[float, ...], at_most: float | None = None) -> dict[str, Any]:
    met = None if at_most is None else ratio <= at_most
    target = None if at_most is None else f"<= {at_most:g}"
    return {"suite": "distributed", "case": case, "ratio": ratio, "spread": list(spread), "target": target, "met": met}


def _told(row: dict[str, Any]) -> tuple[str, ...]:
    verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
    spread = " to ".join(f"{each:.3g}" for each in row["spread"])
    return row["case"], f"{row['ratio']:.3g}", spread, row["target"] or "none", verdict


if __name__ == "__main__":
    raise SystemExit(main())
