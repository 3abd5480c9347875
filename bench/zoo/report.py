"""The zoo's results as a Markdown page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from bench.zoo.trials import OPERATORS, Trial, Visit

_PACKAGES = ("torch", "torchvision", "timm", "pytorchcv", "transformers")


def rate(visits: Iterable[Visit], operator: str) -> tuple[int, int]:
    """Exact trials and all trials of an operator on convolutional classifiers, in float64."""
    trials = [t for v in visits if v.convolutional for t in v.trials if t.operator == operator and t.dtype == "float64"]
    return sum(t.outcome == "exact" for t in trials), len(trials)


def page(visits: Sequence[Visit], places: int) -> str:
    """Totals, a line for each network, and the reasons of all refusals."""
    used = [v for v in visits if not v.unusable]
    wrong = [(v.name, t) for v in used for t in v.trials if t.outcome == "wrong"]
    versions = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    lines = [
        "# The zoo: morphs at random places of other people's networks",
        "",
        f"`make zoo` wrote this on {datetime.now(UTC):%Y-%m-%d}, with {versions}.",
        "Each network has random weights made to look trained: BatchNorm statistics of real activations, no constant vectors.",
        f"Each operator is tried at {places} random places, convolutions or linear layers that the network calls, in float64,",
        "certified to 1e-9 of the output's largest value, and at the first of them in float32 too, to 1e-4. Where widths come",
        "in steps, the nearest that works is taken.",
        "",
        "| on convolutional classifiers | exact | tried | |",
        "|---|---|---|---|",
    ]
    for operator in OPERATORS:
        exact, tried = rate(used, operator)
        lines.append(f"| {operator} | {exact} | {tried} | {100 * exact / max(1, tried):.1f} % |")
    narrow = [t for v in used for t in v.trials if t.dtype == "float32"]
    done = sum(t.outcome == "exact" for t in narrow)
    lines += [
        "",
        f"{len(used)} networks, {sum(len(v.trials) for v in used)} trials; {done} of the {len(narrow)} in float32 exact.",
        f"Neither exact nor refused: {len(wrong) or 'none'}.",
        *[f"- {name}: {t.operator} {t.place} ({t.dtype}): {t.detail}" for name, t in wrong],
        "",
        "| network | convolutional classifier | " + " | ".join(OPERATORS) + " | refused because |",
        "|---|---|" + "---|" * len(OPERATORS) + "---|",
        *[_line(v) for v in visits],
        "",
        "## Why places were refused",
        "",
        "| times | operator | reason |",
        "|---|---|---|",
    ]
    reasons = Counter((t.operator, reason(t)) for v in used for t in v.trials if t.outcome == "refused")
    lines += [f"| {count} | {operator} | {why} |" for (operator, why), count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def reason(trial: Trial) -> str:
    """A refusal without the names and numbers of its place."""
    words = trial.detail.partition(": ")[2] or trial.detail
    words = re.sub(r"'[^']*'", "'...'", words)
    return re.sub(r"\d+", "N", words).replace("|", "/").strip()


def _line(visit: Visit) -> str:
    if visit.unusable:
        return f"| {visit.name} | | | | | cannot be built here: {visit.unusable.replace('|', '/')} |"
    cells = []
    for operator in OPERATORS:
        trials = [t for t in visit.trials if t.operator == operator]
        cells.append(f"{sum(t.outcome == 'exact' for t in trials)}/{len(trials)}")
    why = sorted({f"{t.operator}: {reason(t)}" for t in visit.trials if t.outcome == "refused"})
    return f"| {visit.name} | {'yes' if visit.convolutional else ''} | {' | '.join(cells)} | {'; '.join(why)} |"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
