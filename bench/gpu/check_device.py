"""What only a whole call on a GPU can show: which backend is taken, equal bits, CUDA graphs, streams and peak memory."""

from __future__ import annotations

from collections.abc import Callable

import fastmorph_kernels as kernels
import torch
from fastmorph_kernels.direct import direct
from torch import Tensor

import fastmorph as fm
from bench.gpu import oracle
from bench.gpu.clock import captured, nbytes
from bench.gpu.report import Report
from bench.gpu.setup import Setup
from fastmorph.equation.backends import find_backend

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def decompositions(setup: Setup, report: Report) -> None:
    """`decompose` as it is called: the kernels by default, and exact for each dtype."""
    k, before = setup.k, setup.before
    weight = setup.random(1, 2, 2, *k)
    report.hold("backend=None is not triton", int(find_backend(setup.backend, weight).name != "triton"))
    channels = setup.size(256, 2)
    half_step = fm.General(max_iter=1)
    cases = [
        ("half-step", half_step, 3 * channels, F64),
        ("half-step", half_step, 3 * channels, F32),
        ("half-step", half_step, 3 * channels, BF16),
        ("closed form", fm.Direct(), 2 * channels, F64),
        ("closed form", fm.Direct(), 2 * channels, F32),
        ("closed form", fm.Direct(), 2 * channels, BF16),
        ("closed form of few extra channels", fm.Direct(), channels + 4, F32),
    ]
    for name, solver, hidden, dtype in setup.size(cases, cases[2::2]):
        weight = setup.random(setup.size(2, 1), channels, channels, *k, dtype=dtype)
        found = fm.decompose(
            weight, hidden, **setup.sizes, solver=solver, backend=setup.backend, generator=torch.Generator().manual_seed(0)
        )
        case = f"decompose, {name}, {channels} -> {hidden}, {str(dtype).removeprefix('torch.')}"
        report.check(case, oracle.residual(weight, before, found.first, found.second), fm.tolerance(dtype))
    items, channels, hidden, kernel = setup.size((4, 16, 32, (5, 5)), (1, 2, 2, (3,)))
    weight = setup.random(items, channels, channels, *kernel)
    for acceleration in ("gauss-newton", "anderson"):
        found = fm.decompose(
            weight,
            hidden,
            **setup.sizes,
            solver=fm.General(max_iter=setup.size(400, 1), acceleration=acceleration),
            backend=setup.backend,
            generator=torch.Generator().manual_seed(0),
            allow_inexact=True,
        )
        limit = setup.size(fm.tolerance(F32), 1.0)
        report.check(
            f"decompose, {acceleration}", oracle.residual(weight, (0,) * len(kernel), found.first, found.second), limit
        )


def equal_bits(setup: Setup, report: Report) -> None:
    """Every operator twice."""
    k, before = setup.k, setup.before
    channels = setup.size(512, 2)
    weight, first, second = (setup.random(1, channels, channels, *k, seed=seed) for seed in range(3))
    moves = setup.random(*setup.size((8, 20, 2**17), (2, 3, 50)))
    runs: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
        "compose": lambda: kernels.compose(first, second),
        "compose, tf32x3": lambda: kernels.compose(first, second, precision="tf32x3"),
        "residual": lambda: kernels.residual(first, second, weight, before),
        "correlate": lambda: kernels.correlate(weight, before, first, k),
        "row_gram": lambda: kernels.row_gram(first, k),
        "column_gram": lambda: kernels.column_gram(first, k),
        "anderson_gram": lambda: kernels.anderson_gram(moves, moves[:, 0]),
        "anderson_update": lambda: kernels.anderson_update(moves[:, 0], moves, moves[:, :, 0]),
        "direct": lambda: direct(weight, 2 * channels, k, k, before, 7),
        "direct, shared pairs": lambda: direct(weight, channels + 4, k, k, before, 7),
    }
    for name, run in runs.items():
        once, again = run(), run()
        pairs = [(once, again)] if isinstance(once, Tensor) else list(zip(once, again, strict=True))
        report.hold(f"equal bits, {name}", sum(not torch.equal(one, two) for one, two in pairs))


def graphs(setup: Setup, report: Report) -> None:
    """Capture the closed form and the fixed half-steps, and replay them on another weight."""
    k, before = setup.k, setup.before
    if setup.rehearsal:
        report.skip("CUDA graphs (replay of direct and of fm.alternate on new weights)")
        return
    channels = 256
    for hidden in (2 * channels, channels + 4):
        weight, new = (setup.random(1, channels, channels, *k, seed=seed) for seed in range(2))
        graph, (first, second) = captured(lambda weight=weight, hidden=hidden: direct(weight, hidden, k, k, before, 7))
        weight.copy_(new)
        graph.replay()
        eager = direct(new, hidden, k, k, before, 7)
        differing = sum(not torch.equal(one, two) for one, two in zip((first, second), eager, strict=True))
        report.hold(f"graph of direct, {channels} -> {hidden}, on a new weight", differing)
    for name, batch, channels, hidden, kernel, steps in (
        ("exact half-step by columns", 1, 64, 192, k, 1),
        ("exact half-steps of a batch", 64, 16, 48, k, 1),
        ("half-steps by rows", 4, 32, 64, (5, 5), 6),
    ):
        weight, new = (setup.random(batch, channels, channels, *kernel, dtype=F64, seed=seed) for seed in range(2))
        start = setup.random(batch, hidden, channels, *k, dtype=F64, seed=2)
        graph, replayed = captured(lambda weight=weight, start=start, steps=steps: fm.alternate(weight, start, k, steps))
        weight.copy_(new)
        graph.replay()
        eager = fm.alternate(new, start, k, steps)
        gap = max(oracle.relative(one, two) for one, two in zip(replayed[:2], eager[:2], strict=True))
        report.check(f"graph of fm.alternate, {name}, on new weights", gap, fm.tolerance(F64))
        if steps == 1:
            report.check(f"graph of fm.alternate, {name}: residual", float(replayed[2].max()), fm.tolerance(F64))


def streams(setup: Setup, report: Report) -> None:
    """On a stream that comes late to its input: an operator that ran on another stream would read what was there before."""
    k, before = setup.k, setup.before
    if setup.rehearsal:
        report.skip("streams")
        return
    channels = 128
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "compose": lambda w: kernels.compose(w, w),
        "column_gram": lambda w: kernels.column_gram(w, k),
        "direct": lambda w: direct(w, 2 * channels, k, k, before, 7)[0],
        "fm.alternate": lambda w: fm.alternate(w.double(), w.double(), k, 1)[1],
    }
    new = setup.random(1, channels, channels, *k, seed=1)
    for name, run in runs.items():
        eager = run(new)
        weight, side = setup.random(1, channels, channels, *k), torch.cuda.Stream()
        setup.wait()
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**8)  # some 50 ms
            weight.copy_(new)
            out = run(weight)
        side.synchronize()
        report.check(f"side stream, {name}", oracle.relative(out, eager.double()), fm.tolerance(F64))


def peak_memory(setup: Setup, report: Report) -> None:
    """`decompose` by the closed form: the weight, both factors and at most a tenth besides."""
    k = setup.k
    if setup.rehearsal:
        report.skip("peak memory (Direct at 8192 channels 3x3, and Linear 16384)")
        return
    for channels, hidden, kernel in (
        (8192, 8192, k),
        (8192, 8200, k),
        (8192, 16384, k),
        (16384, 16384, ()),
        (16384, 32768, ()),
    ):
        setup.release()
        held = torch.cuda.memory_allocated()
        weight = setup.random(channels, channels, *kernel)
        setup.wait()
        torch.cuda.reset_peak_memory_stats()
        found = fm.decompose(weight, hidden, spatial_dims=len(kernel), solver=fm.Direct())
        setup.wait()
        needed = nbytes((weight, found.first, found.second))
        case = f"Direct, {channels} -> {hidden}, {'3x3' if kernel else 'linear'}, float32"
        report.check(f"{case}: residual", float(found.residual), fm.tolerance(F32), kept=True)
        report.check(f"{case}: peak memory", (torch.cuda.max_memory_allocated() - held) / needed, 1.1, kept=True)
        del weight, found
