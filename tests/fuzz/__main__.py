"""`make fuzz`: growths for as long as one likes, in parts that resume; a table, and a script for each that went wrong.

FUZZ="--growths 1000 --seed 0 --resume out/fuzz.jsonl" runs the seeds from 0 to 999 that the file does not have yet.
FUZZ=--record writes the refusals, by cause, into tests/fuzz/refusals.md. The exit status is 1 where anything but "ok" and
"refused" was found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from tests.fuzz.growths import KINDS, Outcome, run, shrink

RECORD = Path(__file__).with_name("refusals.md")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--growths", type=int, default=1000, help="how many seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--resume", type=Path, help="a file of JSON lines, one a growth; seeds that it has are not run again")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--whole", action="store_true", help="leave failing growths as they are instead of making them smaller")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = range(options.seed, options.seed + options.growths)
    outcomes = list(_outcomes(seeds, options.resume, options.quiet))
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in tqdm(bad, desc="making smaller", unit="growth", disable=options.quiet or options.whole):
        print(f"\n--- seed {outcome.seed}\n{(outcome if options.whole else shrink(outcome)).script()}")
    if options.record:
        RECORD.write_text(refusals(outcomes, seeds), encoding="utf-8")
    return 1 if bad else 0


def _outcomes(seeds: range, path: Path | None, quiet: bool) -> Iterator[Outcome]:
    """What the file has, and then the rest, each written to the file as soon as it is there."""
    known: dict[int, Outcome] = {}
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):  # else the part before was cut off here
                found = Outcome(**json.loads(line))
                known[found.seed] = found
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    yield from (known[seed] for seed in seeds if seed in known)
    for seed in tqdm([seed for seed in seeds if seed not in known], desc="growing", unit="growth", disable=quiet):
        outcome = run(seed)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        yield outcome


def table(outcomes: list[Outcome]) -> str:
    """How many ended how, by cause, each with its smallest seed."""
    counts = Counter((outcome.kind, outcome.cause) for outcome in outcomes)
    totals = Counter(outcome.kind for outcome in outcomes)
    first = {(outcome.kind, outcome.cause): outcome.seed for outcome in sorted(outcomes, key=lambda o: -o.seed)}
    lines = [f"{len(outcomes)} growths, {sum(o.milliseconds for o in outcomes) / max(1, len(outcomes)):.0f} ms each"]
    for kind in KINDS:
        lines.append(f"{totals[kind]:6d}  {kind}")
        for (of, cause), count in counts.most_common():
            if of == kind and cause:
                lines.append(f"          {count:5d}  {cause}  (seed {first[of, cause]})")
    return "\n".join(lines)


def refusals(outcomes: list[Outcome], seeds: range) -> str:
    """The refusals by cause, as Markdown."""
    refused = Counter(outcome.cause for outcome in outcomes if outcome.kind == "refused")
    kinds = Counter(outcome.kind for outcome in outcomes)
    lines = [
        "# What the fuzzer was refused",
        "",
        f'`make fuzz FUZZ="--seed {seeds.start} --growths {len(seeds)} --record"` wrote this: '
        + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS)
        + ". Names are `_` and numbers N.",
        "",
        "| refused | cause |",
        "|---:|---|",
        *(f"| {count} | {cause} |" for cause, count in sorted(refused.items(), key=lambda item: (-item[1], item[0]))),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
