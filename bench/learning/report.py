"""The page of results: medians and spreads, steps to the from-scratch child's score, all from the one file."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

_HEAD = """# Does a grown network learn better?

Written by `make experiments` from results.jsonl. A parent is trained to the end of its learning rate's schedule and grown. Each
arm then has the compute of as many steps of the child ("twice": twice that; "as many steps" and Net2Net: those steps), AdamW, a
learning rate that decays to 0 by a cosine, and the same order of batches. Scores are accuracies in percent, for the text
negative bits a character: higher is better. Median over the seeds, and the least and the most. "Reaches": after which share of
its run an arm's score is for the first time that of the child from scratch at the end of the same compute, both on the quarter
of the test data on which the scores on the way are taken.
"""


def read(results: Path) -> list[Row]:
    """The lines of a file of results; none where there is no file."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def write(results: Path) -> None:
    """Write results.md and results.svg beside the file."""
    rows = read(results)
    (results.parent / "results.md").write_text(page(rows), encoding="utf-8")
    draw(rows, results.parent / "results.svg")


def page(rows: list[Row]) -> str:
    """The whole page."""
    parts = [_HEAD]
    for task in dict.fromkeys(row["task"] for row in rows):
        parts.append(f"## {task}\n\n{table([row for row in rows if row['task'] == task])}\n")
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    """One task's arms."""
    heads = ["arm", "seeds", "parent", "at birth", "at the end", "reaches", "steps", "parameters"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    marks = {row["seed"]: row["curve"][-1][1] for row in rows if row["arm"] == "child from scratch"}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        reached = [share for row in own if (share := reaches(row, marks.get(row["seed"]))) is not None]
        share = f"{median(reached):.0%} ({len(reached)} of {len(own)})" if reached else "never"
        ends = [row["final"] for row in own]
        births, parents = (median(row[key] for row in own) for key in ("birth", "parent"))
        cells = [arm, len(own), f"{parents:.2f}", f"{births:.2f}", _spread(ends), share]
        lines.append(f"| {' | '.join(map(str, cells))} | {own[0]['steps']:,} | {own[0]['parameters']:,} |")
    return "\n".join(lines)


def overview(rows: list[Row]) -> str:
    """A row an arm and a column a task: the scores at the end."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    seeds = {name: len({row["seed"] for row in rows if row["task"] == name}) for name in names}
    heads = ["at the end", *(f"{name}, {seeds[name]} seeds" for name in names)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    parents = {(row["task"], row["seed"]): row["parent"] for row in rows}
    lines.append(_overviewed("parent, before", [[v for (n, _), v in parents.items() if n == name] for name in names]))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        finals = [[row["final"] for row in rows if (row["task"], row["arm"]) == (name, arm)] for name in names]
        lines.append(_overviewed(arm, finals))
    return "\n".join(lines) + "\n"


def _overviewed(arm: str, finals: list[list[float]]) -> str:
    return f"| {' | '.join([arm, *(_spread(ends) if ends else '' for ends in finals)])} |"


def _spread(ends: list[float]) -> str:
    return f"{median(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})"


def reaches(row: Row, mark: float | None) -> float | None:
    """The share of its run after which a row has a score; None if never."""
    if mark is None:
        return None
    return next((step / row["steps"] for step, score in row["curve"] if score >= mark), None)


def draw(rows: list[Row], path: Path) -> None:
    """Scores over the compute since birth, medians over the seeds, one picture a task."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fastmorph"
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False)
    for axis, task in zip(axes[0], names, strict=True):
        for arm, style in _DRAWN.items():
            own = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
            if own:
                curves = [[row["curve"][place][1] for row in own] for place in _places(own)]
                unit = own[0]["flops_a_step"] / 1e9
                steps = [own[0]["curve"][place][0] * unit for place in _places(own)]
                axis.plot(steps, [median(values) for values in curves], style, label=arm)
        parents = median(row["parent"] for row in rows if row["task"] == task)
        axis.axhline(parents, color="gray", linewidth=0.8, linestyle=":")
        low = parents - 1.2 * abs(max(row["final"] for row in rows if row["task"] == task) - parents)
        axis.set_ylim(bottom=low)
        axis.set_title(task)
        axis.set_xlabel("compute since birth, GFLOP")
    axes[0][0].set_ylabel("score")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


_DRAWN = {"pair": "C3-", "child from scratch, twice": "C0--", "child from scratch": "C0-", "parent, trained on": "C7-"}


def _places(rows: list[Row]) -> range:
    return range(min(len(row["curve"]) for row in rows))
