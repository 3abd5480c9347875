"""The correlation: the composition kernel again, with its own configurations."""

from __future__ import annotations

from collections.abc import Iterator

from fastmorph_kernels.compose.kernel import _compose_kernel

from bench.cases.case import Case
from bench.cases.tiles import tile_cases


def cases(target: str) -> Iterator[Case]:
    """Every configuration; `first` is transposed, so that both ways of packing it are the composition's."""
    yield from tile_cases("correlate", _compose_kernel, target)
