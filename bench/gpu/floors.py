"""Every kernel against its floor: the longer of the times that its bytes and its operations take at the measured ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fastmorph_kernels as kernels
import torch
from fastmorph_kernels.direct import direct
from torch import Tensor

from bench.gpu import counts
from bench.gpu.ceilings import Ceilings
from bench.gpu.clock import nbytes, on_device
from bench.gpu.grown import doubled
from bench.gpu.report import Report
from bench.gpu.setup import Setup
from bench.measurements import Measured, Measurement

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
Products = Literal["ieee", "tf32", "tf32x3"]


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        name: of the row.
        run: the operator.
        make: its inputs by seed; each is read once at least, and each output written once.
        operations: that it takes at least.
        products: which of the measured rates bounds them.
        capture: whether it may be held by a CUDA graph.
    """

    name: str
    run: Callable[..., Any]
    make: Callable[[int], tuple[Any, ...]]
    operations: float
    products: str
    capture: bool = True


def measure(setup: Setup, report: Report, ceilings: Ceilings) -> None:
    """All kernels; the ratio is the time over the floor."""
    for case in [*_products(setup), *_memory(setup)]:
        setup.release()
        inputs = case.make(0)
        size = nbytes(inputs) + nbytes(case.run(*inputs))
        del inputs
        floor = ceilings.floor(size, case.operations, case.products)
        times = on_device(setup, case.run, case.make, capture=case.capture)
        medians = {"kernel": times.median, "floor": floor}
        spread = (times.low / floor, times.high / floor)
        report.add(
            Measured(Measurement("gpu kernel", case.name, "kernel", "floor"), medians, times.median / floor, spread, None)
        )


def _products(setup: Setup) -> Iterator[Case]:
    """What multiplies: a large layer, a batch of small ones, and a small layer alone."""
    k, before = setup.k, setup.before
    all_ways: list[tuple[torch.dtype, Products]] = [
        (F64, "ieee"),
        (F32, "ieee"),
        (F32, "tf32x3"),
        (F32, "tf32"),
        (BF16, "ieee"),
    ]
    for batch, c, ways in setup.size(
        [(1, 512, all_ways), (64, 64, all_ways[:2]), (1, 64, all_ways[1:2])], [(2, 3, all_ways[:2]), (1, 2, all_ways[4:])]
    ):
        for dtype, precision in ways:

            def make(seed: int, count: int, batch: int = batch, c: int = c, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
                return tuple(setup.random(batch, c, c, *k, dtype=dtype, seed=3 * seed + i) for i in range(count))

            products = str(dtype).removeprefix("torch.") if precision == "ieee" else precision
            compose, gram = batch * counts.composition(c, c, c, k, k), batch * counts.row_gram(c, c, k, k)
            correlation = batch * counts.correlation(c, c, c, k, k, k, before)

            def case(
                name: str,
                run: Callable[..., Any],
                count: int,
                operations: float,
                make: Callable[..., tuple[Tensor, ...]] = make,
                products: str = products,
                label: str = f"{batch} x {c} channels, {products}",
            ) -> Case:
                return Case(f"{name}, {label}", run, lambda seed: make(seed, count), operations, products)

            p: Products = precision
            yield case("compose", lambda a, b, p=p: kernels.compose(a, b, precision=p), 2, compose)
            yield case("residual", lambda a, b, w, p=p: kernels.residual(a, b, w, before, precision=p), 3, compose)
            yield case("correlate", lambda w, a, p=p: kernels.correlate(w, before, a, k, precision=p), 2, correlation)
            yield case("row_gram", lambda a, p=p: kernels.row_gram(a, k, precision=p), 1, gram)
            yield case(
                "column_gram", lambda a, p=p: kernels.column_gram(a, k, precision=p), 1, batch * counts.column_gram(c, c, k)
            )


def _memory(setup: Setup) -> Iterator[Case]:
    """What is bound by memory: the closed form, Anderson's memory, wider layers."""
    k, before = setup.k, setup.before
    for co, hidden, kernel, dtype in setup.size(
        [
            (1024, 2048, k, F32),
            (1024, 2048, k, BF16),
            (1024, 2048, k, F64),
            (1024, 1032, k, F32),
            (4096, 8192, (), F32),
            (64, 128, k, F32),
        ],
        [(4, 8, k, F32)],
    ):

        def make(seed: int, co: int = co, kernel: tuple[int, ...] = kernel, dtype: torch.dtype = dtype) -> tuple[Tensor]:
            return (setup.random(1, co, co, *kernel, dtype=dtype, seed=seed),)

        def run(weight: Tensor, hidden: int = hidden, kernel: tuple[int, ...] = kernel) -> tuple[Tensor, Tensor]:
            return direct(weight, hidden, kernel, kernel, before[: len(kernel)], 7, density=0.5)

        label = f"{co} -> {hidden}, {'3x3' if kernel else 'linear'}, {str(dtype).removeprefix('torch.')}"
        yield Case(f"direct, {label}", run, make, 0.0, "float32")
    batch, memory, n = setup.size((64, 20, 73728), (2, 3, 40))
    for dtype in (F64, F32):

        def vectors(seed: int, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor, Tensor]:
            shapes = ((batch, n), (batch, memory, n), (batch, memory))
            image, images, share = (setup.random(*shape, dtype=dtype, seed=3 * seed + i) for i, shape in enumerate(shapes))
            return image, images, share

        def gram(image: Tensor, images: Tensor, share: Tensor) -> Tensor:
            return kernels.anderson_gram(images, image, accumulate=F64)

        products, label = str(dtype).removeprefix("torch."), f"{batch} x {memory} x {n}, {str(dtype).removeprefix('torch.')}"
        yield Case(f"anderson_gram, {label}", gram, vectors, 1.0 * batch * memory * (memory + 3) * n, "float64")
        yield Case(f"anderson_update, {label}", kernels.anderson_update, vectors, 2.0 * batch * memory * n, products)
    c = setup.size(1024, 6)
    grown = [doubled(c, seed) for seed in range(8)]

    def weights(seed: int) -> tuple[Tensor, ...]:
        return tuple(setup.random(c, c, 9, seed=8 * seed + i) for i in range(8))

    def fill(*sources: Tensor) -> list[Tensor]:
        return kernels.fill(sources, grown, [0] * len(sources))

    yield Case(f"fill, 8 of {c} to {2 * c} channels, float32", fill, weights, 0.0, "float32", capture=False)
