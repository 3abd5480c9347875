"""The composition kernel."""

from __future__ import annotations

from collections.abc import Iterator

from fastmorph_kernels.compose.kernel import _compose_kernel

from bench.cases.case import Case
from bench.cases.tiles import tile_cases


def cases(target: str) -> Iterator[Case]:
    """Every configuration."""
    yield from tile_cases("compose", _compose_kernel, target)
