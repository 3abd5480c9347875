"""What the tuner tries its candidates on: for each variant of each kernel's table, an operator at a size that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fastmorph_kernels as kernels
import torch
from fastmorph_kernels.direct import direct
from torch import Tensor

from bench.gpu import oracle
from bench.gpu.setup import Setup

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
_PRODUCTS = ("column_gram", "correlate", "residual", "compose", "row_gram")
# Batch, channels and hidden channels at which a variant of the product kernels is the one to choose.
_SHAPES = {"large": (1, 512, 512), "medium": (64, 64, 128), "small": (64, 32, 64)}


@dataclass(frozen=True)
class Trial:
    """One entry of a kernel's table.

    Attributes:
        kernel: whose table.
        dtype: of the entry.
        variant: the entry.
        meanwhile: entries that hold the candidate while it is tried, so that it runs whatever the sizes would choose.
        make: inputs.
        run: the operator.
        limit: largest relative distance of its result from that of the settings that are in the table.
        fixed: fields that must stay.
    """

    kernel: str
    dtype: torch.dtype
    variant: str
    meanwhile: tuple[str, ...]
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    limit: float
    fixed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kernel}, {str(self.dtype).removeprefix('torch.')}, {self.variant}"


def groups(setup: Setup) -> dict[str, list[Trial]]:
    """All trials, in the order of what is claimed: the closed form, one large half-step, many small equations, the rest."""
    large = [_product(setup, kernel, F64, "large") for kernel in _PRODUCTS]
    medium = [_product(setup, kernel, F64, "medium") for kernel in _PRODUCTS]
    return {
        "direct": [_direct(setup, F32, variant) for variant in ("weight", "delta", "weight_many", "delta_many", "sums")],
        "half_step": [*large, _shifts(setup, F64)],
        "batch": [*medium, *_anderson(setup, F64), *_anderson(setup, F32)],
        "tf32x3": [_product(setup, kernel, F32, f"{size}_tensor") for size in ("large", "medium") for kernel in _PRODUCTS],
        "float32": [
            *(_product(setup, kernel, F32, "large") for kernel in _PRODUCTS),
            _shifts(setup, F32),
        ],
        "bfloat16": [*(_product(setup, kernel, BF16, "large") for kernel in _PRODUCTS), _direct(setup, BF16, "weight")],
        "small": [_product(setup, kernel, F64, "small") for kernel in _PRODUCTS],
    }


def _product(setup: Setup, kernel: str, dtype: torch.dtype, variant: str) -> Trial:
    size, _, tensor = variant.partition("_")
    kind = f"_{tensor}" if tensor else ""
    batch, channels, hidden = setup.size(_SHAPES[size], (1, 2, 2))
    k, before, precision = setup.k, setup.before, "tf32x3" if tensor else "ieee"

    def make() -> tuple[Tensor, Tensor, Tensor]:
        first = setup.random(batch, hidden, channels, *k, dtype=dtype)
        second = setup.random(batch, channels, hidden, *k, dtype=dtype, seed=1)
        return first, second, setup.random(batch, channels, channels, *k, dtype=dtype, seed=2)

    runs: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
        "compose": lambda first, second, weight: kernels.compose(first, second, precision=precision),
        "residual": lambda first, second, weight: kernels.residual(first, second, weight, before, precision=precision),
        "correlate": lambda first, second, weight: kernels.correlate(weight, before, first, k, precision=precision),
        "row_gram": lambda first, second, weight: kernels.row_gram(first, k, precision=precision),
        "column_gram": lambda first, second, weight: kernels.column_gram(first, k, precision=precision),
    }
    # Square tiles where both sides are the same channels.
    fixed = ("block_n",) if kernel == "row_gram" else ()
    meanwhile = ("small", f"medium{kind}", f"large{kind}")
    return Trial(kernel, dtype, variant, meanwhile, make, runs[kernel], 1e-4 if tensor else _limit(dtype), fixed)


def _shifts(setup: Setup, dtype: torch.dtype) -> Trial:
    base = _product(setup, "column_gram", dtype, "large")
    return Trial("column_gram", dtype, "shifts", ("shifts",), base.make, base.run, base.limit)


def _direct(setup: Setup, dtype: torch.dtype, variant: str) -> Trial:
    """Twice the channels, or so few more that blocks share pairs, which is what the variants for many registers are for."""
    few = variant in ("weight_many", "delta_many", "sums")
    co, ci, hidden = setup.size((2048, 2048, 2056 if few else 4096), (66, 2, 68) if few else (4, 4, 8))

    def make() -> tuple[Tensor]:
        return (setup.random(1, co, ci, *setup.k, dtype=dtype),)

    def run(weight: Tensor) -> Any:
        return direct(weight, hidden, setup.k, setup.k, setup.before, 7, density=0.5)

    return Trial("direct", dtype, variant, (variant,), make, run, max(1e-5, _limit(dtype)))


def _anderson(setup: Setup, dtype: torch.dtype) -> list[Trial]:
    batch, memory, n = setup.size((64, 20, 73728), (1, 3, 40))

    def make() -> tuple[Tensor, Tensor, Tensor]:
        image, images = setup.random(batch, n, dtype=dtype), setup.random(batch, memory, n, dtype=dtype, seed=1)
        return image, images, setup.random(batch, memory, dtype=dtype, seed=2)

    runs = {
        "gram": lambda image, images, share: kernels.anderson_gram(images, image, accumulate=F64),
        "update": lambda image, images, share: kernels.anderson_update(image, images, share),
    }
    return [Trial("anderson", dtype, name, (name,), make, run, _limit(dtype)) for name, run in runs.items()]


def _limit(dtype: torch.dtype) -> float:
    """Sums of 1e4 terms taken in two orders."""
    return oracle.rounding(10_000, F64 if dtype == F64 else F32, dtype)
