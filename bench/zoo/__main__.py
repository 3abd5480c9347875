"""Morph every network of the zoo at random places, and write `bench/zoo/results.md`.

Exit status: 0 if every trial was exact or refused, 1 otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench.zoo import transformers
from bench.zoo.models import architectures, missing
from bench.zoo.report import page
from bench.zoo.trials import Visit, visit

RESULTS = Path(__file__).with_name("results.md")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", help="zoo/model, or a part of it (default: all)")
    parser.add_argument("--places", type=int, default=3, help="for each operator (default 3)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help=f"where to write (default: {RESULTS.name} if all networks were tried)")
    parser.add_argument("--transformers", action="store_true", help="every way to grow a transformer: the page transformers.md")
    options = parser.parse_args()
    if options.transformers:
        return transformers.run(options.networks or None)

    names = [name for name in architectures() if not options.networks or any(part in name for part in options.networks)]
    for zoo in sorted({name.partition("/")[0] for name in names}):
        if package := missing(zoo):
            parser.error(f"{zoo} needs {package}: make zoo installs it")
    visits: list[Visit] = []
    context = multiprocessing.get_context("spawn")  # no network's leftovers in another's process memory
    with context.Pool(options.processes, initializer=torch.set_num_threads, initargs=(1,), maxtasksperchild=8) as pool:
        for found in tqdm(pool.imap(partial(visit, places=options.places), names), total=len(names), unit="network"):
            visits.append(found)
            outcomes = Counter(f"{t.operator} {t.outcome}" for t in found.trials)
            tqdm.write(f"{found.name}: {found.unusable or dict(outcomes)} {found.seconds:.0f} s")
            for trial in found.trials:
                if trial.outcome != "exact":
                    tqdm.write(f"    {trial.outcome} {trial.operator} {trial.place} ({trial.dtype}): {trial.detail}")
    text = page(visits, options.places)
    out = options.out or (None if options.networks else RESULTS)
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return int(any(trial.outcome == "wrong" for v in visits for trial in v.trials))


if __name__ == "__main__":
    sys.exit(main())
