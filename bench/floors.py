"""What work takes at least: its bytes and operations over what this machine gives, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter

import torch

_COPIED, _SIDE, _RUNS = 2**26, 1024, 5  # bytes, rows of a square matrix, runs of which the fastest counts


@dataclass(frozen=True)
class Ceilings:
    """Rates per second.

    Attributes:
        copy: bytes, read and written.
        matrix: operations by how products are taken: a dtype; on a GPU also "tf32", and tf32x3, which is a third of it.
    """

    copy: float
    matrix: Mapping[str, float]

    def floor(self, size: float, operations: float, products: str) -> float:
        """Seconds that so many bytes and operations take at least."""
        return max(size / self.copy, operations / self.matrix[products])


@dataclass(frozen=True)
class Job:
    """What is to be done, however it is done.

    Attributes:
        shape: of the data, in words.
        dtype: what they are in.
        moved: bytes that must be read and written at least.
        operations: additions and multiplications at least, by their dtype.
    """

    shape: str
    dtype: str = "float32"
    moved: float = 0
    operations: Mapping[str, float] = field(default_factory=dict)

    def floor(self) -> float:
        """Seconds that it takes at least, on as many threads as PyTorch has."""
        rates = ceilings()
        return max(self.moved / rates.copy, sum(count / rates.matrix[dtype] for dtype, count in self.operations.items()))


@cache
def ceilings() -> Ceilings:
    """Copies of 64 MiB, and products of square matrices of 1024 rows."""
    source = torch.ones(_COPIED // 4)
    to = torch.empty_like(source)
    rates = {}
    for dtype in (torch.float32, torch.float64):
        one, two = torch.rand(2, _SIDE, _SIDE, dtype=dtype)
        rates[str(dtype).removeprefix("torch.")] = 2.0 * _SIDE**3 / _fastest(lambda one=one, two=two: one @ two)  # type: ignore[misc]
    return Ceilings(2.0 * _COPIED / _fastest(lambda: to.copy_(source)), rates)


def _fastest(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_RUNS):
        began = perf_counter()
        run()
        seconds.append(perf_counter() - began)
    return min(seconds)
