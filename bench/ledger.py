"""The committed ledger of results, `bench/ledger.jsonl`: one line a measurement, with what it was taken on.

Fields: schema (2; the first one had fewer fields, and no number), date (UTC), commit ("-dirty" where files differ from it; the
variable FASTMORPH_COMMIT tells it where git cannot), machine (cpu, cores, threads of every contender, gpu), versions, precision
(of float32 products), suite, case, ratio, spread (of one visit's ratios; on a GPU, where its slowest and fastest fifth begin),
residual (the largest), target, met; and of each contender median_s, p20_s, p80_s, floor_s (see `bench.floors`), dtype, shape,
residuals, peak_mb (of a run, on top of what was held before; none where it was not taken), and asks (of the user's model).
Seconds are there to be checked against, not to be compared between lines: machines differ, and are shared.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.measurements import Measured

LEDGER = Path(__file__).resolve().parent / "ledger.jsonl"
SCHEMA = 2
EACH = ("median_s", "p20_s", "p80_s", "floor_s", "dtype", "shape", "residuals", "peak_mb", "asks")  # of each contender
FIELDS = (
    *("schema", "date", "commit", "machine", "versions", "precision", "suite", "case", "ratio", "spread", "residual"),
    *("target", "met"),
    *EACH,
)


def rows(measured: Sequence[Measured], report: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """What is to be recorded of one run of pytest-benchmark."""
    shared = provenance(report["machine_info"]["cpu"].get("brand_raw"), threads)
    precision = torch.get_float32_matmul_precision()
    return [{"schema": SCHEMA, **shared, "precision": precision, **figures(m), **_each(m)} for m in measured]


def provenance(cpu: str | None, threads: int) -> dict[str, Any]:
    """When, of what and on what."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": threads,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "numpy", "triton")}},
    }


def figures(m: Measured) -> dict[str, Any]:
    """What was measured."""
    return {
        "suite": m.measurement.suite,
        "case": m.measurement.case,
        "median_s": {name: _short(seconds) for name, seconds in m.medians.items()},
        "ratio": _short(m.ratio),
        "spread": [_short(ratio) for ratio in m.spread],
        "residual": None if m.residual is None else _short(m.residual),
        "target": m.measurement.target,
        "met": m.measurement.met(m.ratio),
        **({"residuals": {name: _short(residual) for name, residual in m.residuals.items()}} if m.residuals else {}),
        **({"peak_mb": {name: _short(peak / 1e6) for name, peak in m.peaks.items()}} if m.peaks else {}),
    }


def _each(m: Measured) -> dict[str, Any]:
    """What is told of each contender."""
    return {
        "p20_s": {name: _short(low) for name, (low, _) in m.fifths.items()},
        "p80_s": {name: _short(high) for name, (_, high) in m.fifths.items()},
        "floor_s": {name: _short(floor) for name, floor in m.floors.items()},
        "dtype": m.dtypes,
        "shape": m.shapes,
        "residuals": {name: _short(residual) for name, residual in m.residuals.items()},
        "peak_mb": {name: _short(peak / 1e6) for name, peak in m.peaks.items()},
        "asks": m.asks,
    }


def append(lines: Iterable[dict[str, Any]]) -> None:
    """Add lines to the ledger."""
    with LEDGER.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=LEDGER.parent.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    if told := os.environ.get("FASTMORPH_COMMIT"):
        return told
    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", ".", f":!bench/{LEDGER.name}")
    except (OSError, subprocess.CalledProcessError):
        return None  # not a clone
    return head + "-dirty" * bool(changed)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _short(number: float) -> float:
    return float(f"{number:.4g}")
