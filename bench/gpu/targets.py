"""The four things that are claimed of a GPU, each timed against what it is claimed against."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from fastmorph_kernels.direct import direct
from torch import Tensor

import fastmorph as fm
from bench.gpu import counts, goals, oracle
from bench.gpu.ceilings import Ceilings
from bench.gpu.clock import Times, captured, nbytes, on_device, once, whole
from bench.gpu.report import Report
from bench.gpu.setup import Setup
from bench.measurements import Measured, Measurement
from fastmorph.equation.backends.torch_backend import dense_system, pad
from fastmorph.equation.frame import make_frame

F64, F32 = torch.float64, torch.float32
# C_out and C_in of the 13 convolutions of VGG-16 (Simonyan and Zisserman 2015).
VGG16 = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256), *[(512, 512)] * 5]
_LOOP_SECONDS = 40.0  # for a loop whose parts are all alike; beyond it a part of it is timed, and said to be


def closed_form(setup: Setup, report: Report, ceilings: Ceilings) -> None:
    """Target 1: G is read once and both factors are written once, at the speed of a copy."""
    k, before = setup.k, setup.before
    channels, hidden = setup.size((2048, 4096), (16, 32))

    def run(weight: Tensor) -> tuple[Tensor, Tensor]:
        return direct(weight, hidden, k, k, before, 7, density=0.5)

    def make(seed: int) -> tuple[Tensor]:
        return (setup.random(1, channels, channels, *k, seed=seed),)

    (weight,) = make(0)
    factors = run(weight)
    left = oracle.residual(weight, before, *factors)
    _must_be_exact(left, fm.tolerance(F32))
    floor = ceilings.floor(nbytes((weight, *factors)), 0.0, "float32")
    del factors
    setup.release()
    _ratio(report, goals.DIRECT, floor, on_device(setup, run, make), left)
    if setup.rehearsal:
        report.skip("the closed form in a CUDA graph")
    else:
        graph, _ = captured(lambda: run(weight))
        replayed = on_device(setup, graph.replay, lambda seed: (), capture=False)
        goal = replace(goals.DIRECT, case=f"{goals.DIRECT.case} in a CUDA graph", at_least=None)
        _ratio(report, goal, floor, replayed, left)
        del graph
    call = whole(setup, lambda: fm.decompose(weight[0], hidden, **setup.sizes, solver=fm.Direct(), backend=setup.backend))
    case = f"{goals.DIRECT.case.partition(':')[0]}: memory floor / decompose, residual and checks included"
    _ratio(report, Measurement("gpu", case, "floor", "decompose"), floor, call, left)


def half_step(setup: Setup, report: Report, ceilings: Ceilings) -> None:
    """Target 2: one exact half-step, against the rate of the precision that it works in and the same GPU's own least squares.

    Then the same in float32 throughout, which the condition of the Gram matrix may cost its exactness: the residual tells.
    """
    k, before = setup.k, setup.before
    frame = make_frame(k, (k, k))
    channels, hidden = _half_step_sizes(setup)
    operations = counts.half_step(channels, hidden, channels, frame)
    for dtype, goal in ((F64, goals.HALF_STEP_LSTSQ), (F32, _in_float32(goals.HALF_STEP_LSTSQ))):
        weight, found, left = _half_step(setup, dtype)
        start = found.first[None].clone()
        del found
        ours = _half_step_time(setup, weight)
        rate = goals.HALF_STEP_RATE if dtype == F64 else _in_float32(goals.HALF_STEP_RATE)
        _ratio(report, rate, operations / ceilings.matrix["float64"], ours, left)
        setup.release()
        system = dense_system(start, k)[0].mT.contiguous()  # (Ci * |N|, Ch * |K2|)
        target = pad(weight[None], before, frame.size)[0].flatten(1).mT.contiguous()

        def least_squares(system: Tensor = system, target: Tensor = target) -> Tensor:
            return torch.linalg.lstsq(system, target, driver="gels").solution  # the driver that GPUs have

        theirs = oracle.relative(system @ least_squares(), target.double())
        if dtype == F64:
            _must_be_exact(theirs, fm.tolerance(F64))
        lstsq = whole(setup, least_squares, 3)
        _ratio(report, goal, lstsq.median, ours, max(left, theirs))
        del system, target
        setup.release()
        name = str(dtype).removeprefix("torch.")
        goal = Measurement("gpu", f"half-step by fm.alternate, {name} throughout: arithmetic floor / call", "floor", "call")

        def alternate(weight: Tensor = weight, start: Tensor = start) -> Tensor:
            return fm.alternate(weight[None], start, k, backend=setup.backend)[2]

        _ratio(report, goal, operations / ceilings.matrix[name], whole(setup, alternate, 5), float(alternate().max()))
    weight = setup.random(channels, channels, *k)
    for precision, rate in (("ieee", "float32"), ("tf32x3", "tf32x3")):
        found = _decompose_by_half_step(setup, weight, precision)
        left = oracle.residual(weight[None], before, found.first[None], found.second[None])
        del found
        case = f"{_in_float32(goals.HALF_STEP_RATE).case}, precision={precision!r}"
        times = _half_step_time(setup, weight, precision)
        _ratio(report, Measurement("gpu", case, "floor", "decompose"), operations / ceilings.matrix[rate], times, left)


def half_step_numpy(setup: Setup, report: Report, ceilings: Ceilings) -> None:
    """Target 2 against the numpy reference, in a process of its own; its sizes grow while there is time for the next.

    Where there is not time for the whole, the largest that was timed is scaled by the operations of a least-squares solution,
    which grow with the cube of the channels, and the row says so.
    """
    weight, _, left = _half_step(setup, F64)
    ours = _half_step_time(setup, weight)
    timed, seconds, theirs = 0, 0.0, 0.0
    for channels in setup.size((64, 128, 256, 512), (2,)):
        if timed and 1.3 * seconds * (channels / timed) ** 3 > report.left:
            break
        command = [sys.executable, "-m", "bench.gpu.numpy_half_step", str(channels), str(3 * channels)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=max(1.0, report.left))
        except subprocess.TimeoutExpired:
            report.say(f"numpy's half-step of {channels} channels was not done in time")
            break
        answer = json.loads(done.stdout)
        timed, seconds, theirs = channels, answer["seconds"], answer["residual"]
        report.say(f"numpy's half-step of {channels} channels: {seconds:.3g} s")
    if not timed:
        raise TimeoutError("there was no time for the numpy reference at any size")
    goal, (channels, _) = goals.HALF_STEP_NUMPY, _half_step_sizes(setup)
    if timed != channels:
        goal = replace(goal, case=f"{goal.case}, numpy scaled from {timed} channels by operations")
        seconds *= (channels / timed) ** 3
    _ratio(report, goal, seconds, ours, max(left, theirs))


def _half_step_sizes(setup: Setup) -> tuple[int, int]:
    return setup.size((512, 1536), (2, 6))


def _half_step(setup: Setup, dtype: torch.dtype) -> tuple[Tensor, fm.Decomposition, float]:
    """A weight, its exact answer and the residual of that."""
    channels, _ = _half_step_sizes(setup)
    weight = setup.random(channels, channels, *setup.k, dtype=dtype)
    found = _decompose_by_half_step(setup, weight)
    left = oracle.residual(weight[None], setup.before, found.first[None], found.second[None])
    _must_be_exact(left, fm.tolerance(dtype))
    return weight, found, left


def _half_step_time(setup: Setup, weight: Tensor, precision: str | None = None) -> Times:
    return whole(setup, lambda: _decompose_by_half_step(setup, weight, precision), 5)


def _decompose_by_half_step(setup: Setup, weight: Tensor, precision: str | None = None) -> fm.Decomposition:
    _, hidden = _half_step_sizes(setup)
    solver, generator = fm.General(max_iter=1), torch.Generator().manual_seed(0)
    options = {"backend": setup.backend, "precision": precision, "generator": generator}
    return fm.decompose(weight, hidden, **setup.sizes, solver=solver, allow_inexact=precision is not None, **options)


def vgg(setup: Setup, report: Report, ceilings: Ceilings) -> None:
    """Target 3: a whole network's layers in one call, against one layer after another in plain PyTorch on the same GPU."""
    k, before = setup.k, setup.before
    shapes = setup.size(VGG16, [(3, 2), (4, 3), (4, 4), (4, 4)])
    weights = [setup.random(co, ci, *k, seed=seed) for seed, (co, ci) in enumerate(shapes)]
    for times in (1, 2):  # as `deepen` chooses the hidden channels, and with pairs to spare
        problems = [fm.Problem(weight, times * len(weight), **setup.sizes) for weight in weights]

        def batch(problems: Sequence[fm.Problem] = problems) -> list[fm.Decomposition]:
            return fm.decompose_many(problems, backend=setup.backend, generator=_seeded(), progress=False)

        def loop(problems: Sequence[fm.Problem] = problems) -> list[fm.Decomposition]:
            generator = _seeded()
            return [
                fm.decompose(p.weight, p.hidden_channels, **setup.sizes, backend="torch", generator=generator) for p in problems
            ]

        left = max(
            oracle.residual(p.weight[None], before, found.first[None], found.second[None])
            for run in (batch, loop)
            for p, found in zip(problems, run(), strict=True)
        )
        _must_be_exact(left, fm.tolerance(F32))
        wider = replace(goals.VGG, case=f"{goals.VGG.case}, twice the hidden channels", at_least=None)
        goal = goals.VGG if times == 1 else wider
        _ratio(report, goal, whole(setup, loop).median, whole(setup, batch), left)


def general(setup: Setup, report: Report, ceilings: Ceilings) -> None:
    """Target 4: what must be iterated, in one batch against one after another in plain PyTorch on the same GPU."""
    items, channels, hidden, kernel = setup.size((64, 64, 128, (5, 5)), (2, 2, 2, (3,)))
    weight = setup.random(items, channels, channels, *kernel)
    limit, none = setup.size(fm.tolerance(F32), 1.0), (0,) * len(kernel)
    for acceleration in ("gauss-newton", "anderson"):
        solver: Any = fm.General(max_iter=setup.size(400, 1), acceleration=acceleration)

        def solve(weight: Tensor, backend: str | None, solver: Any = solver) -> fm.Decomposition:
            return fm.decompose(
                weight, hidden, **setup.sizes, solver=solver, backend=backend, generator=_seeded(), allow_inexact=True
            )

        found = solve(weight, setup.backend)
        left = oracle.residual(weight, none, found.first, found.second)
        _must_be_exact(left, limit)
        batch = whole(setup, lambda solve=solve: solve(weight, setup.backend), 3)
        found = solve(weight[0], "torch")
        left = max(left, oracle.residual(weight[:1], none, found.first[None], found.second[None]))
        _must_be_exact(left, limit)
        one = once(setup, lambda solve=solve: solve(weight[0], "torch"))
        several = min(items, max(2, int(_LOOP_SECONDS / one.median)))
        loop = once(setup, lambda solve=solve, several=several: [solve(item, "torch") for item in weight[:several]])
        case = goals.GENERAL.case if acceleration == "gauss-newton" else f"{goals.GENERAL.case}, by Anderson"
        if several < items:
            case += f", {several} of the loop's {items} timed"
        goal = replace(goals.GENERAL, case=case, at_least=goals.GENERAL.at_least if acceleration == "gauss-newton" else None)
        _ratio(report, goal, loop.median * items / several, batch, left)


def _ratio(report: Report, goal: Measurement, over: float, under: Times, residual: float) -> None:
    """Take down the ratio of two times; its spread is that of the one that divides."""
    medians = {goal.over: over, goal.under: under.median}
    report.add(Measured(goal, medians, over / under.median, (over / under.high, over / under.low), residual))


def _must_be_exact(residual: float, tolerance: float) -> None:
    if not residual <= tolerance:
        raise ArithmeticError(f"relative residual {residual:.1e}, exact means at most {tolerance:.1e}; not timed")


def _in_float32(goal: Measurement) -> Measurement:
    """The same for a weight in float32, which the half-step is solved for in float64 all the same; no target."""
    return replace(goal, case=goal.case.replace("float64", "float32"), at_least=None)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
