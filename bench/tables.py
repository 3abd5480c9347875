"""Tables of the README and the site from the ledger: python -m bench.tables writes them, a test holds them to it.

A table stands between `<!-- ledger: NAME -->` and `<!-- end -->`; its rows are the newest line of each case that is measured.
That of learning comes from the experiments' results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.equation import measurements as equation
from bench.learning import report as learning
from bench.ledger import LEDGER
from bench.networks import measurements as networks
from bench.peers import measurements as peers

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "learning.md")
RESULTS = Path(__file__).parent / "learning" / "results.jsonl"
SUITES = (*equation.MEASUREMENTS, *networks.MEASUREMENTS, *peers.MEASUREMENTS)
HEADLINES = (
    "half-step, float64: numpy / torch",
    "C = 96: numpy's half-step / Auto",
    "General, 5x5 -> (3, 3), 4 channels through 7: scipy's least_squares / fastmorph",
    "256 units and half as many more: GroMo / fastmorph",
    "1024 units and half as many more: GroMo / fastmorph",
    "resnet152: 50 Widen / one Widen",
    "57 to 83 million weights: filling, pair / cloning",
    "resnet50: every layer's coupling / Torch-Pruning's groups",
    "resnet50: certificate / its 4 forward passes",
)
_MARK = re.compile(r"(<!-- ledger: ([\w, -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = "| | ratio | target | times | floor | largest error | measured |\n|---|---|---|---|---|---|---|\n"
_PEERS = "| | who | time | a fifth below, above | floor | MB | error | what it asks |\n|---|---|---|---|---|---|---|---|\n"


def newest() -> list[dict[str, Any]]:
    """The newest line of each case that is still measured, or that no suite of the CPU measures, in the order they came."""
    lines = [json.loads(line) for line in LEDGER.read_text(encoding="utf-8").splitlines()]
    measured = {(m.suite, m.case) for m in SUITES}
    suites = {m.suite for m in SUITES} | {"scaling"}
    found = {(line["suite"], line["case"]): line for line in lines}
    return [line for key, line in found.items() if key in measured or key[0] not in suites]


def table(lines: Iterable[dict[str, Any]]) -> str:
    """A row a line: a ratio with the times of both, and what the second one's work takes at least."""
    return _HEAD + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines)


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    target = (line["target"] or "").replace(">=", "at least").replace("<=", "at most")
    verdict = "" if line["met"] is None else ", met" if line["met"] else ", **missed**"
    times = [_seconds(value) for value in line["median_s"].values()]
    floors = list(line.get("floor_s", {}).values())
    return (
        line["case"],
        f"{line['ratio']:.3g}",
        f"{target}{verdict}",
        (" / " if len(times) < 3 else " to ").join([*times[:1], *times[1:][-1:]]),
        _seconds(floors[-1]) if floors else "",
        f"{line['residual']:.0e}",
        f"{line['date'][:10]}, `{(line['commit'] or '?')[:7]}`",
    )


def by_contender(lines: Iterable[dict[str, Any]]) -> str:
    """A row a contender, with what each preserved and what it asks of the user's model."""
    rows: dict[tuple[str, str], str] = {}
    for line in lines:
        for name, median in line["median_s"].items() if "asks" in line else ():
            spread = f"{_seconds(line['p20_s'][name])}, {_seconds(line['p80_s'][name])}"
            peak = line["peak_mb"].get(name)
            cells = (
                *(line["shape"][name], re.sub(r", \d+[a-z ]*$", "", name), _seconds(median), spread),
                *(_seconds(line["floor_s"][name]), "" if peak is None else f"{peak:.0f}", f"{line['residuals'][name]:.0e}"),
                line["asks"].get(name, ""),
            )
            rows.setdefault((line["suite"], name), f"| {' | '.join(cells)} |\n")
    return _PEERS + "".join(rows.values())


def _seconds(value: float) -> str:
    """With three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs" if value else "none"


def filled(page: str) -> str:
    """A page with its tables written anew; names are suites, with "by contender" in front, or "headlines"."""
    lines = newest()

    def write(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[2].split(",")]
        if names == ["learning"]:
            return match[1] + learning.overview(learning.read(RESULTS)) + match[3]
        wanted = (line for line in lines if line["suite"] in names or (names == ["headlines"] and line["case"] in HEADLINES))
        return match[1] + (by_contender if names[0] == "by contender" else table)(wanted) + match[3]

    return _MARK.sub(write, page)


def main() -> None:
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
