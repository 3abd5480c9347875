"""Tables of the README and the site from the ledger: python -m bench.tables writes them, a test holds them to it.

A table stands between `<!-- ledger: NAME -->` and `<!-- end -->`; its rows are the newest line of each case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.ledger import LEDGER

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
HEADLINES = (
    "half-step, float64: numpy / torch",
    "Auto, float64: numpy's half-step / closed form",
    "General, 5x5 -> (3, 3), 4 channels through 7: scipy's least_squares / fastmorph",
    "256 hidden units to 384: GroMo / fastmorph on a kept structure",
    "resnet152: 50 Widen / one Widen",
    "57 to 83 million weights: filling, pair / cloning",
    "resnet50: every layer's coupling / Torch-Pruning's groups",
    "resnet50: certificate / its 4 forward passes",
)
_MARK = re.compile(r"(<!-- ledger: ([\w, -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = "| | ratio | target | largest error | measured |\n|---|---|---|---|---|\n"


def newest() -> list[dict[str, Any]]:
    """The newest line of each case, in the order in which the cases came."""
    lines = [json.loads(line) for line in LEDGER.read_text(encoding="utf-8").splitlines()]
    return list({(line["suite"], line["case"]): line for line in lines}.values())


def table(lines: Iterable[dict[str, Any]]) -> str:
    """A row a line."""
    return _HEAD + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines)


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    target = (line["target"] or "").replace(">=", "at least").replace("<=", "at most")
    verdict = "" if line["met"] is None else ", met" if line["met"] else ", **missed**"
    each = line.get("residuals") or {"": line["residual"]}
    told = len(set(each.values())) > 1 and line["suite"] in ("wider", "deeper", "joint", "steps")
    error = ", ".join(f"{name} {value:.0e}" for name, value in each.items()) if told else f"{line['residual']:.0e}"
    return (
        line["case"],
        f"{line['ratio']:.3g}",
        f"{target}{verdict}",
        error,
        f"{line['date'][:10]}, `{(line['commit'] or '?')[:7]}`",
    )


def filled(page: str) -> str:
    """A page with its tables written anew; names are suites, or "headlines"."""
    lines = newest()

    def write(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[2].split(",")]
        wanted = (line for line in lines if line["suite"] in names or (names == ["headlines"] and line["case"] in HEADLINES))
        return match[1] + table(wanted) + match[3]

    return _MARK.sub(write, page)


def main() -> None:
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
