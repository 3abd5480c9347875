"""Check, time or tune the kernels on this machine's GPU.

Parts, each in its own time: `check` (is every answer right?), `time` (the four targets), `floors` (every kernel against the
longer of its memory and arithmetic times), `tune` (write this device's tile sizes into the kernels' tables), `tests` (the
kernels' tests, compiled). Exit status: 0 when all ran and every answer was right (a missed target is a result: it is printed
and recorded), 1 otherwise.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable
from functools import partial

PARTS = ("check", "time", "floors", "tune", "tests")
_GRACE = 25.0  # seconds for a section that was begun in time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: the first three)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, interpreted; the figures mean nothing")
    parser.add_argument(
        "--record", action="store_true", help="append timings, precisions and memory to bench/ledger.jsonl as they come"
    )
    parser.add_argument("--only", action="append", metavar="SECTION", help="only this section of a part; may be repeated")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="for each part; no section is begun after them (default 7.5)"
    )
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: it must be one of {', '.join(PARTS)}")
    if options.only and len(options.parts) != 1:
        parser.error("--only needs the one part that its sections are of")
    if options.record and options.rehearse:
        parser.error("figures of a rehearsal mean nothing and are not recorded")
    # Triton reads this when a kernel is decorated, so that nothing that imports it may come before.
    os.environ["TRITON_INTERPRET"] = "1" if options.rehearse else "0"

    import torch

    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU here; --rehearse runs everything on the CPU")
    status = 0
    for part in options.parts or PARTS[:3]:
        print(f"== {part}", flush=True)
        # A section that hangs must not cost the results of the others: they are recorded as they come.
        faulthandler.dump_traceback_later(60 * options.minutes + _GRACE, exit=True)
        status |= _run(part, options)
        faulthandler.cancel_dump_traceback_later()
    if options.rehearse:
        print("A rehearsal: figures mean nothing.")
    return status


def _run(part: str, options: argparse.Namespace) -> int:
    from bench.gpu.report import Report
    from bench.gpu.setup import Setup

    setup = Setup(options.rehearse)
    report = Report(options.minutes, record=options.record, judged=not options.rehearse)
    sections: dict[str, Callable[[], None]] = {}
    if part == "check":
        from bench.gpu import check

        sections = {name: partial(section, setup, report) for name, section in check.SECTIONS.items()}
    elif part in ("time", "floors"):
        from bench.gpu import ceilings, floors, time

        measured = ceilings.measure(setup, report)
        found = time.SECTIONS if part == "time" else {"kernels": floors.measure}
        sections = {name: partial(section, setup, report, measured) for name, section in found.items()}
    elif part == "tune":
        from bench.gpu import tune

        sections = {name: partial(section, setup, report) for name, section in tune.SECTIONS.items()}
    else:
        from bench.gpu import tests

        sections = {name: partial(tests.run, setup, report, name) for name in tests.FILES}
    unknown = [name for name in options.only or () if name not in sections]
    if unknown:
        report.fail(f"unknown section {unknown[0]!r} of {part}: it must be one of {', '.join(sections)}")
    report.run([(name, run) for name, run in sections.items() if not options.only or name in options.only], setup.release)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
