"""Part `tune`: find this device's tile sizes, and write them into the kernels' tables.

Each entry of a table is a search of its own: the settings one step away from those that stand there, one field at a time, and
last what has gained alone, all together. Every candidate's result is checked before it is timed. They are compiled on all cores
first, which takes longer than the rest.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton.testing
from fastmorph_kernels.configs import lookup
from torch import Tensor

from bench.gpu import oracle
from bench.gpu.report import Report
from bench.gpu.setup import Setup
from bench.gpu.tables import Config, holding, write
from bench.gpu.trials import Trial, groups

_GAIN = 1.02  # less is noise
_PROCESSES = 12
# Smallest and largest of each field, all but `num_stages` and `pack` powers of two.
_RANGES = {
    "block_m": (16, 256),
    "block_n": (16, 2048),
    "block_k": (16, 128),
    "block": (128, 8192),
    "span": (1, 64),
    "tiles": (1, 128),
    "num_warps": (1, 8),
    "num_stages": (1, 5),
    "pack": (0, 2),
}


def tune(setup: Setup, report: Report, group: str) -> None:
    """Search for every entry of a group while there is time, and write each as it is found."""
    trials = groups(setup)[group]
    tried = [(index, candidate) for index, trial in enumerate(trials) for candidate in neighbours(trial, _now(setup, trial))]
    broken = _compile(setup, report, group, tried)
    for index, trial in enumerate(trials):
        if report.left <= 0:
            report.fail(f"{trial.name}: not begun, the time is over; run it by --only {group}")
            continue
        candidates = [c for at, c in tried if at == index and (at, c) not in broken]
        best, gain = _search(setup, report, trial, candidates)
        report.say(f"{trial.name}: {gain:.3f} times as fast with {best}" if gain > 1 else f"{trial.name}: stays as it is")
        if gain > 1 and not setup.rehearsal:
            write(trial.kernel, trial.dtype, trial.variant, best, setup.device)
        setup.release()


def neighbours(trial: Trial, config: Config) -> list[Config]:
    """The settings one step away, one field at a time."""
    found = []
    for field, value in config.items():
        if field in trial.fixed or field not in _RANGES:
            continue
        low, high = _RANGES[field]
        steps = {"num_stages": (value - 1, value + 1), "pack": range(low, high + 1)}.get(field, (value // 2, value * 2))
        found += [_moved(trial, config, {field: step}) for step in steps if step != value and low <= step <= high]
    return found


def _moved(trial: Trial, config: Config, fields: Config) -> Config:
    moved = {**config, **fields}
    if "block_n" in trial.fixed:  # a square tile
        moved["block_n"] = moved["block_m"]
    return moved


def _now(setup: Setup, trial: Trial) -> Config:
    return lookup(trial.kernel, trial.dtype, trial.variant, setup.device)


def _search(setup: Setup, report: Report, trial: Trial, candidates: Sequence[Config]) -> tuple[Config, float]:
    """The fastest settings that give the right result, and how many times as fast as those in the table."""
    now, inputs = _now(setup, trial), trial.make()
    with holding(trial.kernel, trial.dtype, trial.meanwhile, now, setup.device):
        right = _tensors(trial.run(*inputs))
        times = [(_time(setup, trial, inputs), now)]

    def attempt(candidate: Config) -> None:
        with holding(trial.kernel, trial.dtype, trial.meanwhile, candidate, setup.device):
            if _same(_poisoned(trial, inputs), right, trial.limit):
                times.append((_time(setup, trial, inputs), candidate))
            else:
                report.fail(f"{trial.name}: the result is wrong with {candidate}")

    for candidate in candidates:
        if report.left > 0:
            attempt(candidate)
    gained = sorted((pair for pair in times[1:] if pair[0] * _GAIN < times[0][0]), key=lambda pair: pair[0])
    alone: Config = {}  # of each field that gains alone, its best value
    for _, candidate in gained:
        for field, value in candidate.items():
            if value != now[field]:
                alone.setdefault(field, value)
    together = _moved(trial, now, alone)
    if len(alone) > 1 and together not in candidates:
        error = _compiles(setup, trial, together)
        if error:
            report.say(f"{trial.name}: {error} with {together}")
        else:
            attempt(together)
    seconds, best = min(times, key=lambda pair: pair[0])
    gain = times[0][0] / seconds
    return (best, gain) if gain >= _GAIN else (now, 1.0)


def _compile(setup: Setup, report: Report, group: str, tried: Sequence[tuple[int, Config]]) -> list[tuple[int, Config]]:
    """Run every candidate once, on a GPU in many processes whose compilers fill one cache; those that cannot run."""
    if setup.rehearsal:
        tried = tried[:: max(1, len(tried) // 3)]
        errors = [_compiles(setup, groups(setup)[group][index], candidate) for index, candidate in tried]
    else:
        with multiprocessing.get_context("spawn").Pool(min(_PROCESSES, os.cpu_count() or 1)) as pool:
            running = pool.starmap_async(partial(_compiles_alone, group), tried, chunksize=1)
            errors = running.get(timeout=max(1.0, report.left))
    broken = [(one, error) for one, error in zip(tried, errors, strict=True) if error]
    for (index, candidate), error in broken:
        report.say(f"{groups(setup)[group][index].name}: {error} with {candidate}")
    return [one for one, _ in broken]


def _compiles_alone(group: str, index: int, candidate: Config) -> str:
    setup = Setup(rehearsal=False)
    return _compiles(setup, groups(setup)[group][index], candidate)


def _compiles(setup: Setup, trial: Trial, candidate: Config) -> str:
    """What the compiler or the device has against a candidate; nothing if it runs."""
    with holding(trial.kernel, trial.dtype, trial.meanwhile, candidate, setup.device):
        try:
            trial.run(*trial.make())
            setup.wait()
        except Exception as error:  # whatever the compiler raises is told, and the candidate is not used
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def _poisoned(trial: Trial, inputs: tuple[Any, ...]) -> list[Tensor]:
    """A run whose outputs are NaN where they are not written: memory may still hold the right result of the last one."""
    torch.use_deterministic_algorithms(True)
    try:
        return _tensors(trial.run(*inputs))
    finally:
        torch.use_deterministic_algorithms(False)


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def _same(out: Sequence[Tensor], right: Sequence[Tensor], limit: float) -> bool:
    pairs = zip(out, right, strict=True)
    return all(torch.equal(a, b) or (a.is_floating_point() and oracle.relative(a, b.double()) <= limit) for a, b in pairs)


def _time(setup: Setup, trial: Trial, inputs: tuple[Any, ...]) -> float:
    if setup.rehearsal:
        return 1.0
    return float(triton.testing.do_bench(lambda: trial.run(*inputs), warmup=10, rep=40, quantiles=[0.5]))


SECTIONS: dict[str, Callable[[Setup, Report], None]] = {
    **{group: partial(tune, group=group) for group in ("direct", "half_step", "batch")},
    **{group: partial(tune, group=group) for group in ("tf32x3", "float32", "bfloat16", "small")},
}
