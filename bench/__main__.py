"""Time every contender, print the ratios between them and check those against their targets.

Exit status: 0 when every contender's answer was exact and all was timed (a missed target is a result: it is printed and
recorded); that of pytest otherwise, and then nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.equation import measurements as equation
from bench.ledger import LEDGER, append, rows
from bench.measurements import measure, table
from bench.networks import measurements as networks
from bench.peers import measurements as peers

ROOT = Path(__file__).resolve().parent.parent
SUITES = {"equation": equation.MEASUREMENTS, "networks": networks.MEASUREMENTS, "peers": peers.MEASUREMENTS}  # by their folders
# Libraries read these when they are loaded, so they are set for the process that loads them.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"append the results to {LEDGER.relative_to(ROOT)}")
    parser.add_argument("--all", action="store_true", help="what takes minutes as well")
    parser.add_argument("--suite", action="append", choices=SUITES, help="this one alone; may be repeated (default: every one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--quick", action="store_true", help="one round each, to see that all works; the figures mean nothing")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of every contender (default 1: a ratio then owes nothing to how thread pools share a busy machine)",
    )
    options = parser.parse_args()
    if options.record and options.quick:
        parser.error("--quick figures mean nothing and are not recorded")

    suites = options.suite or list(SUITES)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", *(f"bench/{suite}" for suite in suites)]
        command += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={results}"]
        command += [*["--quick"] * options.quick, *["--silent"] * options.quiet, *["--all"] * options.all]
        environment = {**os.environ, **dict.fromkeys(_THREADS, str(options.threads))}
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if status:
            print("Nothing is reported: a contender failed, or its answer is not exact.", file=sys.stderr)
            return status
        report = json.loads(results.read_text())

    measured = measure(report, [m for suite in suites for m in SUITES[suite]])
    print(table(measured, judged=not options.quick))
    for peer, why in peers.LEFT_OUT.items() if "peers" in suites else ():
        print(f"Not timed: {peer}, {why}.")
    if options.quick:
        print("One round each (--quick): the ratios mean nothing.")
    if options.record:
        append(rows(measured, report, options.threads))
        print(f"Recorded in {LEDGER.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
