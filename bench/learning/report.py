"""The page of results: medians and spreads, steps to the from-scratch child's score, all from the one file."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

_HEAD = """# Does a grown network learn better?

Written by `make experiments` from results.jsonl. Each run of an arm has the compute of the grown network's own epochs after its
birth ("twice": twice that), AdamW, a learning rate that decays to 0 by a cosine, and the same order of batches. Scores are
accuracies in percent, for the text negative bits a character: higher is better. Median over the seeds, and the least and the
most. "Reaches": after which share of its run an arm's score is for the first time that of the child from scratch at the end of
twice the compute; on the way the score is taken on a quarter of the test data.
"""


def read(results: Path) -> list[Row]:
    """The lines of a file of results; none where there is no file."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def write(results: Path) -> None:
    """Write results.md beside the file."""
    (results.parent / "results.md").write_text(page(read(results)), encoding="utf-8")


def page(rows: list[Row]) -> str:
    """The whole page."""
    parts = [_HEAD]
    for task in dict.fromkeys(row["task"] for row in rows):
        parts.append(f"## {task}\n\n{table([row for row in rows if row['task'] == task])}\n")
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    """One task's arms."""
    lines = ["| arm | seeds | parent | at birth | at the end | reaches | parameters |", "|---|---|---|---|---|---|---|"]
    marks = {row["seed"]: row["final"] for row in rows if row["arm"] == "child from scratch, twice"}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        reached = [share for row in own if (share := reaches(row, marks.get(row["seed"]))) is not None]
        share = f"{median(reached):.0%} ({len(reached)} of {len(own)})" if reached else "never"
        ends = [row["final"] for row in own]
        spread = f"{median(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})"
        births, parents = (median(row[key] for row in own) for key in ("birth", "parent"))
        lines.append(f"| {arm} | {len(own)} | {parents:.2f} | {births:.2f} | {spread} | {share} | {own[0]['parameters']:,} |")
    return "\n".join(lines)


def reaches(row: Row, mark: float | None) -> float | None:
    """The share of its run after which a row has a score; None if never."""
    if mark is None:
        return None
    return next((step / row["steps"] for step, score in row["curve"] if score >= mark), None)
