"""Launches of the kernels of the closed form: how columns lie in memory, tile sizes and grids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs import launch_options, lookup
from .balance import Balance
from .kernel import direct_kernel, sums_kernel
from .mixing import SIDE, deal, groups_of, shares_pairs
from .scales_kernel import scales_kernel

# A row of so many taps or more fills sectors of memory well as it is.
_LONG_ROW = 32
# Columns of the largest tile that a table may ask for.
_WIDEST = 256
SCALES_BLOCK = 1024  # numbers of a sample at a time
# A GPU is well filled by so many programs; where there are more tiles, each keeps its block of P for several of them.
_PROGRAMS = 2048


@dataclass(frozen=True)
class DirectConfig:
    """Launch settings of one kernel; sizes are powers of two."""

    block_m: int  # columns of a tile
    span: int  # tiles of a program, at most; for "sums", rows of G in a tile
    num_warps: int
    num_stages: int


class ColumnLayout(NamedTuple):
    """How columns (channel, x, y, z) of a tensor lie in memory; see `tile`."""

    strides: tuple[int, ...]
    uniform: bool  # each as far behind the last
    rows_closer: bool  # than columns
    run: bool  # whether rows and taps are one run
    wide: bool  # whether offsets in a tile need more than 32 bits

    @property
    def irregular(self) -> bool:
        """Whether each place in a tile is a sum of its own, in registers of its own."""
        return self.wide or (self.rows_closer and not self.uniform)


def layout_of(tensor: Tensor, size: Sequence[int]) -> ColumnLayout:
    """Of a tensor (B, rows, channels, x, y, z), where columns are counted through taps of `size`."""
    return _layout(tuple(tensor.shape[2:]), tensor.stride()[1:], tuple(size))


@functools.lru_cache(maxsize=1024)  # a network has so many shapes; to find one costs as much as a launch
def _layout(shape: tuple[int, ...], all_strides: tuple[int, ...], size: tuple[int, ...]) -> ColumnLayout:
    row, *strides = all_strides
    channels, *extent = shape
    reach = SIDE * row + _WIDEST * strides[0] + sum((n - 1) * stride for n, stride in zip(size, strides[1:], strict=True))
    # Neighbouring taps lie `step` apart, as far as they are evenly spaced; so do channels, where they follow on.
    step, taps = 1, 1
    for n, stride in zip(reversed(extent), reversed(strides[1:]), strict=True):
        if n > 1 and taps > 0:
            step = stride if taps == 1 else step
            taps = taps * n if stride == step * taps else 0
    even = taps > 0 and extent == list(size)
    if taps == 1:
        step = strides[0]
    uniform = even and (channels == 1 or strides[0] == step * taps)
    strides[-1] = step if even else strides[-1]
    run = even and not uniform and 1 < taps < _LONG_ROW and row == step * taps
    return ColumnLayout(tuple(strides), uniform, step > row, run, reach >= 2**31)


def launch_direct(
    weight: Tensor | None,
    sums: Tensor | None,
    out: Tensor,
    held: int,
    start: Sequence[int],
    tables: tuple[Tensor, Tensor],
    seeds: Tensor,
    scales: Tensor,
    *,
    precision: str,
    config: DirectConfig | None = None,
) -> None:
    """Fill `out` with the factor that has the weight or, where there is none, with the other one: the delta's.

    weight (B, Co, Ci, *K) and out (B, Ch, channels, *K1 or *K2) have three spatial dimensions and any strides; `out`, of which
    the second factor is a transposed view, is not empty. The weight, or the delta's one tap, stands behind `start` in its taps.

    Args:
        held: Co.
        sums: as `launch_sums` fills them; None for the delta, and where no pairs are shared.
        tables: of mixing, and of dealing.
        seeds: (B,) int64, contiguous.
        scales: (B, 2), root mean square of the noise, and what the factor is multiplied by; contiguous, of the mixing's dtype.
        config: other than the table's.
    """
    hidden = out.shape[1]
    settings = settings_of(weight, out, held, config)
    mixing, dealing = tables
    given = out if weight is None else weight  # of a unit matrix no memory is read
    direct_kernel[(settings.programs,)](
        given,
        mixing,
        dealing,
        mixing if sums is None else sums,
        seeds,
        scales,
        out,
        settings.columns,
        settings.blocks,
        groups_of(hidden, held),
        (hidden - held) // 2,
        settings.tiles,
        *start,
        *settings.extent,
        *given.stride()[:2],
        *settings.source.strides,
        *out.stride()[:2],
        *settings.into.strides,
        **settings.constants,
        PRECISION=precision,
        ALIGNED=aligned(hidden, held),
        **launch_options(settings.config),
    )


class Settings(NamedTuple):
    """How one factor is filled."""

    columns: int
    blocks: int
    tiles: int  # of a program
    programs: int
    extent: tuple[int, ...]  # of the weight, or of the delta's one tap
    source: ColumnLayout
    into: ColumnLayout
    constants: dict[str, Any]
    config: DirectConfig


def settings_of(weight: Tensor | None, out: Tensor, held: int, config: DirectConfig | None = None) -> Settings:
    """For a weight (B, Co, Ci, *K), or None for the delta's, and a factor as `launch_direct` has them."""
    batch, hidden, channels, *size = out.shape
    blocks, shared, sides = len(deal(hidden, held)), shares_pairs(hidden, held), _sides(hidden, held)
    into = layout_of(out, size)
    delta = weight is None
    if weight is None:
        extent, source = torch.Size((1, 1, 1)), into._replace(uniform=False)
    else:
        extent, source = weight.shape[3:], layout_of(weight, size)
    if config is None:
        crowded = sides["BLOCK_S"] == SIDE or (into.run and not delta and sides["BLOCK_G"] == SIDE)
        many = shared or crowded or into.irregular or source.irregular
        config = config_for(("delta" if delta else "weight") + "_many" * many, out)
    columns = channels * size[0] * size[1] * size[2]
    block_m = _tile(columns, config)
    taps = columns // channels
    run = into.run and taps <= block_m
    tiles_m = blocks_of(columns, block_m // taps * taps if run else block_m)
    tiles = max(1, min(config.span, batch * blocks * tiles_m // _PROGRAMS))
    constants = {
        **_sizes(size),
        "DELTA": delta,
        "SHARED": shared,
        "UNIFORM_W": source.uniform,
        "UNIFORM_O": into.uniform,
        "ROWS_CLOSER_W": source.rows_closer,
        "ROWS_CLOSER_O": into.rows_closer,
        "RUN_O": run,
        "WIDE": source.wide or into.wide,
        "BLOCK_M": block_m,
        **sides,
    }
    programs = batch * blocks * blocks_of(tiles_m, tiles)
    return Settings(columns, blocks, tiles, programs, tuple(extent), source, into, constants, config)


def launch_sums(
    weight: Tensor,
    sums: Tensor,
    size: Sequence[int],
    start: Sequence[int],
    dealing: Tensor,
    *,
    config: DirectConfig | None = None,
) -> None:
    """Fill `sums` (B, groups, 2, columns) with U^T G, zero where a tap of `size` holds none of the weight's."""
    groups, _, columns = sums.shape[1:]
    source, constants, programs, config = sums_settings_of(weight, len(sums), groups, columns, size, config)
    sums_kernel[(programs,)](
        weight,
        dealing,
        sums,
        columns,
        groups,
        *start,
        *weight.shape[3:],
        *weight.stride()[:2],
        *source.strides,
        **constants,
        **launch_options(config),
    )


def sums_settings_of(
    weight: Tensor, batch: int, groups: int, columns: int, size: Sequence[int], config: DirectConfig | None = None
) -> tuple[ColumnLayout, dict[str, Any], int, DirectConfig]:
    """For `launch_sums`: how the weight lies, what is constant, how many programs there are, and the configuration."""
    source = layout_of(weight, size)
    config = config or config_for("sums", weight)
    block_m = _tile(columns, config)
    constants = {
        **_sizes(size),
        "UNIFORM_W": source.uniform,
        "ROWS_CLOSER_W": source.rows_closer,
        "WIDE": source.wide,
        "BLOCK_M": block_m,
        "BLOCK_R": config.span,
    }
    return source, constants, batch * groups * blocks_of(columns, block_m), config


def launch_scales(sample: Tensor, spread: Tensor | None, balance: Balance, scales: Tensor) -> None:
    """Fill `scales` (2, B, 2) from spreads (B,), or without them from a sample (B, rows, columns, x, y, z) of the weight."""
    count = sample[0].numel()
    scales_kernel[(len(sample),)](
        sample,
        sample if spread is None else spread,
        _balance_table(1.0 / max(1, count), balance, sample.device),
        scales,
        len(sample),
        *sample.shape[1:],
        *sample.stride(),
        GIVEN=spread is not None,
        BLOCK=SCALES_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


@functools.cache  # for good, as the other tables
def _balance_table(share: float, balance: Balance, device: torch.device) -> Tensor:
    return torch.tensor([share, *balance], dtype=torch.float64, device="cpu").to(device)


def config_for(variant: str, like: Tensor) -> DirectConfig:
    """The configuration of "weight", "delta" or "sums"; "_many": for what needs many registers, so more warps."""
    return DirectConfig(**lookup("direct", like.dtype, variant, like.device))


@functools.cache
def _sides(hidden: int, held: int) -> dict[str, int]:
    """Sides of tiles that hold the largest block."""

    def side(sizes: Iterable[int]) -> int:
        return max(16, 1 << (max(sizes) - 1).bit_length())  # 16: the least that a matrix instruction takes

    blocks, shared = deal(hidden, held), shares_pairs(hidden, held)
    return {
        "BLOCK_H": side(block.size for block in blocks),
        "BLOCK_G": side(block.held for block in blocks),
        "BLOCK_S": 16 if shared else side(block.size - block.pairs - block.held for block in blocks),
    }


@functools.cache
def aligned(hidden: int, held: int) -> bool:
    """Whether all blocks are so even that memory is aligned."""
    return all(n % 16 == 0 for block in deal(hidden, held) for n in (block.start, block.size, block.row, block.held))


def _sizes(size: Sequence[int]) -> dict[str, int]:
    """Constants, because to divide by what is known when compiling is cheap."""
    return dict(zip(("SIZE_X", "SIZE_Y", "SIZE_Z"), size, strict=True))


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover a size; Triton's own function costs microseconds on the host."""
    return -(-size // block)


def _tile(columns: int, config: DirectConfig) -> int:
    return min(config.block_m, max(64, 1 << (columns - 1).bit_length()))
