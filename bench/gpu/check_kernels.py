"""Every kernel against float64 PyTorch on the same device, at the sizes of real layers."""

from __future__ import annotations

import fastmorph_kernels as kernels
import torch
from fastmorph_kernels.direct import direct
from fastmorph_kernels.direct_many import direct_many
from fastmorph_kernels.fill.table import flat
from fastmorph_kernels.register import OPERATORS
from torch import Tensor

import fastmorph as fm
from bench.gpu import oracle
from bench.gpu.grown import doubled
from bench.gpu.report import Report
from bench.gpu.setup import Setup

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def products(setup: Setup, report: Report) -> None:
    """compose, residual and correlate; 333 and 510 are multiples of no tile."""
    k, before = setup.k, setup.before
    for channels, hidden in setup.size([(256, 512), (512, 1536), (1024, 1024), (333, 510)], [(3, 5)]):
        for dtype in setup.dtypes:
            first = setup.random(1, hidden, channels, *k, dtype=dtype)
            second = setup.random(1, channels, hidden, *k, dtype=dtype, seed=1)
            weight = setup.random(1, channels, channels, *k, dtype=dtype, seed=2)
            case, bound = f"{channels} channels, {hidden} hidden, {_name(dtype)}", oracle.rounding(9 * hidden, dtype)
            exact = oracle.compose(first, second)
            report.check(f"compose, {case}", oracle.relative(kernels.compose(first, second), exact), bound)
            exact = oracle.error(weight, before, first, second)
            error, squared = kernels.residual(first, second, weight, before)
            report.check(f"residual, {case}", oracle.relative(error, exact), bound)
            report.check(f"residual's norm, {case}", oracle.relative(squared.sqrt(), exact.norm()[None]), bound)
            exact = oracle.MAPS.correlate(weight.double(), before, first.double(), k)
            out = kernels.correlate(weight, before, first, k)
            report.check(f"correlate, {case}", oracle.relative(out, exact), oracle.rounding(9 * channels, dtype))


def grams(setup: Setup, report: Report) -> None:
    """Both Gram matrices, whole."""
    k = setup.k
    for channels, hidden in setup.size([(256, 512), (512, 512), (333, 250)], [(3, 5)]):
        for dtype in setup.dtypes:
            first = setup.random(1, hidden, channels, *k, dtype=dtype)
            case = f"{channels} channels, {hidden} hidden, {_name(dtype)}"
            lower = oracle.MAPS.row_gram(first.double(), k).tril()
            out = kernels.row_gram(first, k)
            report.check(
                f"row_gram, {case}", oracle.relative(out, lower + lower.tril(-1).mT), oracle.rounding(9 * channels, dtype)
            )
            del out, lower
            exact = oracle.MAPS.column_gram(first.double(), k)
            out = kernels.column_gram(first, k)
            report.check(f"column_gram, {case}", oracle.relative(out, exact), oracle.rounding(9 * hidden, dtype))
            del out, exact


def anderson(setup: Setup, report: Report) -> None:
    """The memory of 64 equations of 64 channels and 128 hidden ones."""
    batch, memory, hidden, columns = setup.size((64, 20, 128, 576), (2, 3, 2, 20))
    for dtype in setup.dtypes:
        images, moves = (setup.random(batch, memory, hidden * columns, dtype=dtype, seed=s) for s in (0, 1))
        image, move = (setup.random(batch, hidden * columns, dtype=dtype, seed=s) for s in (2, 3))
        out = kernels.anderson_gram(moves, move, accumulate=F64)
        exact = moves.double() @ torch.cat([moves, move[:, None]], 1).double().mT
        report.check(f"anderson_gram, {_name(dtype)}", oracle.relative(out, exact), oracle.rounding(columns * hidden, F64))
        share = setup.random(batch, memory, dtype=dtype, seed=4)
        out = kernels.anderson_update(image, images, share)
        exact = image.double() - (images.double().mT @ share.double()[:, :, None])[:, :, 0]
        report.check(f"anderson_update, {_name(dtype)}", oracle.relative(out, exact), oracle.rounding(memory + 1, dtype))


def fills(setup: Setup, report: Report) -> None:
    """Wider layers of three dtypes in one call, to the bit."""
    channels = setup.size(512, 6)
    sources = [setup.random(channels, channels, 9, dtype=dtype) for dtype in (F32, BF16, F64)]
    grown = [doubled(channels, seed) for seed in range(3)]
    words, numbers, factors = flat((0, dimensions) for dimensions in grown)
    wanted = [source.new_empty(2 * channels, 2 * channels, 9, device="cpu") for source in sources]
    OPERATORS["fill"].plain(wanted, [source.cpu() for source in sources], words, numbers, factors)
    for found, exact in zip(kernels.fill(sources, grown, [0] * 3), wanted, strict=True):
        report.hold(f"fill, {_name(exact.dtype)}", _differing(found.cpu(), exact))


def closed_form(setup: Setup, report: Report) -> None:
    """direct, into either factor, with pairs to spare, shared pairs, and none."""
    k, before = setup.k, setup.before
    shapes = setup.size(
        [(256, 256, 512), (512, 512, 516), (1024, 1024, 1024), (333, 510, 700), (64, 3, 128)], [(3, 2, 8), (66, 2, 68)]
    )
    for dtype in setup.size((F64, F32, BF16, F16), (F32,)):
        for co, ci, hidden in shapes:
            for into_first in (True, False):
                if hidden < (co if into_first else ci):
                    continue
                weight = setup.random(1, co, ci, *k, dtype=dtype)
                first, second = direct(weight, hidden, k, k, before, 7, density=0.5, into_first=into_first)
                case = f"direct, {ci} -> {hidden} -> {co}, {'first' if into_first else 'second'}, {_name(dtype)}"
                report.check(case, oracle.residual(weight, before, first, second), fm.tolerance(dtype))
                if hidden - (co if into_first else ci) >= 4 and dtype in (F64, F32):
                    zeros = int((first == 0).sum()) + int((second == 0).sum())
                    # A sum is zero by chance about once in 1e8.
                    report.check(f"{case}: share of zeros", zeros / (first.numel() + second.numel()), 1e-6)
    weight = setup.random(2, *setup.size((1024, 1024), (5, 4)))
    first, second = direct(weight, 2 * weight.shape[1], (), (), (), 7)
    report.check("direct, linear, float32", oracle.residual(weight, (), first, second), fm.tolerance(F32))
    weights = [setup.random(1, co, ci, *k) for co, ci, hidden in shapes if hidden >= co]
    through = [hidden for co, _, hidden in shapes if hidden >= co]
    pairs, told, _ = direct_many([(w, hidden, k, k, before, [7], True) for w, hidden in zip(weights, through, strict=True)])
    for weight, hidden, both in zip(weights, through, pairs, strict=True):
        alone = direct(weight, hidden, k, k, before, torch.tensor([7], device=weight.device))
        differing = sum(int((a != b).sum()) for a, b in zip(both, alone, strict=True))
        report.hold(f"direct_many has the bits of direct, {tuple(weight.shape)} -> {hidden}", differing)
    report.check("direct_many, residuals", float(told[0].max()), fm.tolerance(F32))


def precisions(setup: Setup, report: Report) -> None:
    """What tf32 and the short dtypes cost: a product of 256 terms, and the closed form."""
    k, before = setup.k, setup.before
    hidden, channels = 256, setup.size(1024, 8)
    wide = [setup.random(1, hidden, channels, dtype=F64), setup.random(1, channels, hidden, dtype=F64, seed=1)]
    tf32 = 2.0**-10  # of each operand, if it is cut off
    # Three tf32 products a term; a matrix unit takes 8 terms at a time and may cut its sum off after each.
    bounds = {"tf32": 2 * tf32, "tf32x3": (3 * hidden / 8 + 4) * torch.finfo(F32).eps, "ieee": oracle.rounding(hidden, F32)}
    first, second = (x.to(F32) for x in wide)
    for precision, bound in bounds.items():
        out = kernels.compose(first, second, precision=precision)
        report.check(f"product, float32 by {precision}", oracle.relative(out, oracle.compose(first, second)), bound, kept=True)
    for dtype in (BF16, F16):
        first, second = (x.to(dtype) for x in wide)
        out = kernels.compose(first, second)
        report.check(
            f"product, {_name(dtype)}", oracle.relative(out, oracle.compose(first, second)), torch.finfo(dtype).eps, kept=True
        )
    weight = setup.random(1, *setup.size((512, 512), (4, 3)), *k)
    for precision, limit in (("ieee", fm.tolerance(F32)), ("tf32x3", 5e-6), ("tf32", None)):
        first, second = direct(weight, 2 * weight.shape[1], k, k, before, 7, density=0.5, precision=precision)
        report.check(f"direct, residual by {precision}", oracle.residual(weight, before, first, second), limit, kept=True)


def _differing(one: Tensor, other: Tensor) -> int:
    return int((one != other).sum())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
