"""Train every arm of every task that has no result yet, and write the page of results.

A run may be interrupted at any time: each finished arm is a line of bench/learning/results.jsonl, and is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from bench.learning import data, report
from bench.learning.arms import ABLATIONS, HEADLINE, Parent, Start, adamw
from bench.learning.tasks import Task, tasks

RESULTS = Path(__file__).parent / "results.jsonl"
_SCORES = 16  # of a run of the child's steps


def flops(task: Task, model: nn.Module) -> int:
    """Of one training step: a forward pass and twice as much for the backward pass."""
    model = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(task.data.batch(0, 0)[0])
    return 3 * counter.get_total_flops()


def train(task: Task, start: Start, seed: int, first: int, steps: int) -> list[tuple[int, float]]:
    """Train in place; returns (steps done, score) several times on the way. The learning rate ends at 0, by a cosine."""
    model, optimizer, curve = start.model, start.optimizer, []
    rates = [group["lr"] for group in optimizer.param_groups]
    every = max(10, task.steps // _SCORES)
    model.train()
    for step, (x, y) in enumerate(task.batches(seed, first, steps), 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            group["lr"] = rate * decay * min(1.0, step / max(1, start.warm_up * steps))
        optimizer.zero_grad()
        task.data.loss(model, x, y).backward()
        optimizer.step()
        start.each_step(step / steps)
        if step % every == 0 or step == steps:
            curve.append((step, score(task, model, whole=False)))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return curve


def score(task: Task, model: nn.Module, whole: bool = True) -> float:
    was = model.training
    found = task.data.score(model.eval(), whole)
    model.train(was)
    return found


def make_parent(task: Task, seed: int) -> tuple[Parent, float]:
    torch.manual_seed(seed)
    model = task.make()
    optimizer = adamw(task, model)
    train(task, Start(model, optimizer, warm_up=0.05), seed, 0, task.steps)
    return (model, optimizer, task.data.batch(seed, 0)[0][:2]), score(task, model)


def run_arm(task: Task, name: str, parent: Parent, parents_score: float, seed: int, reference: int) -> dict[str, Any]:
    """One line of results; `reference` is the compute of one step of the grown network."""
    start = {**HEADLINE, **ABLATIONS}[name](task, copy.deepcopy(parent), seed)
    birth = score(task, start.model)
    own = flops(task, start.model)
    steps = task.steps if start.same_steps else round(start.budget * task.steps * reference / own)
    first = 0 if "scratch" in name else task.steps
    curve = train(task, start, seed, first, steps)
    return {
        "task": task.name,
        "arm": name,
        "seed": seed,
        "parent": parents_score,
        "birth": birth,
        "final": score(task, start.model),
        "steps": steps,
        "flops_a_step": own,
        "parameters": sum(parameter.numel() for parameter in start.model.parameters()),
        "curve": [[step, round(value, 4)] for step, value in curve],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__.partition("\n")[0])
    parser.add_argument("--task", action="append", help="this one alone; may be repeated (default: all)")
    parser.add_argument(
        "--seeds", type=int, default=5, help="of the headline's arms (default 5; ablations have three on one net)"
    )
    parser.add_argument("--quick", action="store_true", help="a run of two minutes, to see that all works; nothing is kept")
    parser.add_argument(
        "--report", action="store_true", help="write the page from the results that are there, and train nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if not options.report:
        torch.set_num_threads(1)
        data.fetch()
        if options.quick:
            with tempfile.TemporaryDirectory() as folder:
                run(tasks(quick_run=True), 1, Path(folder) / "results.jsonl", options)
            print("All arms ran (--quick): their figures mean nothing and are not kept.")
            return
        run(tasks(), options.seeds, RESULTS, options)
    report.write(RESULTS)


def run(found: dict[str, Task], seeds: int, results: Path, options: argparse.Namespace) -> None:
    chosen = [found[name] for name in options.task or (["quick", "text"] if options.quick else found)]
    done = {(row["task"], row["arm"], row["seed"]) for row in report.read(results)}
    wanted = [
        (task, seed, [arm for arm in arms if (task.name, arm, seed) not in done and (task.deeper or arm not in ABLATIONS)])
        for seed in range(seeds)
        for task in chosen
        for arms in [[*HEADLINE, *(ABLATIONS if task.name == "quick" and seed < 3 else ())]]
    ]
    bar = tqdm(total=sum(len(arms) for _, _, arms in wanted), unit="arm", disable=options.quiet)
    for task, seed, arms in wanted:
        if not arms:
            continue
        parent, parents_score = make_parent(task, seed)
        reference = flops(task, HEADLINE["pair"](task, copy.deepcopy(parent), seed).model)
        for arm in arms:
            bar.set_description(f"{task.name}, seed {seed}: {arm}")
            row = run_arm(task, arm, parent, parents_score, seed, reference)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            bar.update()


if __name__ == "__main__":
    main()
