"""Compile every kernel with every shipped configuration, with no GPU, and print what came out.

    python -m bench.static sm_90 gfx942

The interpreter on which the tests run accepts code that does not compile, and knows neither registers nor shared memory;
this knows those. It must run without TRITON_INTERPRET. Exit status: 0 when everything compiled, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from bench.cases import all_cases
from bench.cases.case import SHARED_LIMIT, TARGETS, Case, compile_case

_COLUMNS = {
    "kernel": 16,
    "variant": 8,
    "dtype": 9,
    "layout": 14,
    "target": 7,
    "registers": 9,
    "spilled": 7,
    "shared": 7,
    "matrix": 7,
    "matrix_count": 12,
    "loads": 6,
    "wide": 5,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--json", type=Path, help="write a JSON list with one object for each compiled kernel")
    parser.add_argument(
        "--cases", action="append", default=[], help="only those of this module of bench.cases; may be repeated"
    )
    options = parser.parse_args()
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}: it must be one of {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels do not compile: unset TRITON_INTERPRET")

    work = [(case, target) for target in options.targets or TARGETS for case in all_cases(target, options.cases)]
    if not work:
        parser.error(f"bench.cases has no cases in {options.cases}")
    rows, failures = compile_all(work)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def compile_all(work: list[tuple[Case, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compile on every core; kernels do not pickle, so the forked processes inherit `work` and are told places in it."""
    global _work
    _work = work
    processes = min(len(os.sched_getaffinity(0)), len(work)) or 1
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        done = pool.map(_compile, range(len(work)), chunksize=1)
    return [row for row in done if not isinstance(row, str)], [row for row in done if isinstance(row, str)]


_work: list[tuple[Case, str]] = []


def _compile(place: int) -> dict[str, Any] | str:
    case, target = _work[place]
    try:
        return compile_case(case, target)
    except Exception as error:  # whatever the compiler raises: it is reported, and the other cases are still compiled
        constants = ", ".join(f"{name}={value}" for name, value in case.constants.items())
        return f"{case.kernel} {case.variant} {case.dtype} for {target} ({constants}): {type(error).__name__}: {error}"


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, its constants last."""
    lines = [" ".join(f"{name:<{width}}" for name, width in _COLUMNS.items()) + " constants"]
    for row in rows:
        cells = [f"{row[name]!s:<{width}}" for name, width in _COLUMNS.items()]
        constants = {**row["constants"], **row["options"]}
        over = " OVER THE SHARED MEMORY" if row["shared"] > SHARED_LIMIT[row["target"]] else ""
        lines.append(" ".join(cells) + " " + " ".join(f"{name}={value}" for name, value in constants.items()) + over)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
