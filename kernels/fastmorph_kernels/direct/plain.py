"""The closed form in plain PyTorch, on any device, with the P and the noise of the kernels: for CPUs, and GPUs without Triton.

The working memory is a few ranges of channels: what stays in a CPU's cache, and what fills another device.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..noise import Keys, fill, mix_keys
from .balance import Scale
from .mixing import MixingBlock, along, deal, groups_of, mixing_table, shares_pairs

_NUMBERS_CPU, _NUMBERS = 2**17, 2**24  # of a range
_ROOT = 2.0**0.5


class Room:
    """Working memory by name, used again for each range: to have it anew costs a CPU more than what is done in it."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._new = functools.partial(like.new_empty, dtype=dtype)
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of this shape, with whatever is in it; it is the one that had this name before."""
        size, kept = math.prod(shape), self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = self._new(size)
        return kept[:size].view(shape)


class Run(NamedTuple):
    """Neighbouring blocks of P with equal sizes, which are mixed together; `number` of them."""

    first: MixingBlock
    number: int
    held: Tensor  # (1, size, rows of G)
    noise: Tensor  # (1, size, rows of noise); where pairs are shared, (number, size, 5): what is taken of five rows
    rows: Tensor  # where pairs are shared, (number, 5): which ones of those that `_shared` makes

    def of(self, dealt: Tensor) -> Tensor:
        """Of (1 or B, hidden, n), the channels of these blocks, (number or B, size, n)."""
        return _cut(dealt, self.first.start, self.number, self.first.size)


class Noise(NamedTuple):
    """The rows of noise of one factor."""

    streams: Keys  # (B, rows)
    drawn: Tensor | None  # (B, rows, columns); None: not yet

    def __call__(self, columns: slice, room: Room) -> Tensor:
        """Some columns of all rows, (B, rows, n)."""
        if self.drawn is not None:
            return self.drawn[:, :, columns]
        rows = room("noise", *self.streams.shape, columns.stop - columns.start)
        fill(rows.flatten(0, 1), self.streams.reshape(-1), columns.start, 1.0)
        return rows


def noise_of(keys: Keys, pairs: int, single: int, columns: int, room: Room) -> tuple[Noise, Noise]:
    """Of the weight's factor and of the delta's, in which the odd channel meets zeros, under (B,) keys.

    Where so many columns are no more than a range, both are drawn at once: for small layers that takes half the time.
    """
    factors = mix_keys(keys[:, None], np.arange(2, dtype=np.uint64))
    streams = mix_keys(factors[:, :, None], np.arange(pairs + single, dtype=np.uint64))  # (B, 2, rows)
    drawn = None if columns == 0 else Noise(streams.reshape(len(keys), 2 * (pairs + single)), None)(slice(0, columns), room)
    both = None if drawn is None else drawn.view(*streams.shape, columns)
    one, two = (None, None) if both is None else (both[:, 0], both[:, 1, :pairs])
    return Noise(streams[:, 0], one), Noise(streams[:, 1, :pairs], two)


def in_a_range(device: torch.device) -> int:
    """Numbers of a factor that are mixed at a time."""
    return _NUMBERS_CPU if device.type == "cpu" else _NUMBERS


def fill_factor(
    given: Tensor | None,
    out: Tensor,
    held: int,
    start: Sequence[int],
    noise: Noise,
    scales: tuple[Scale, Scale],
    room: Room,
    *,
    delta: bool,
    work: torch.dtype = torch.float64,
) -> None:
    """Fill `out` (B, hidden, channels, x, y, z) with the factor that has the weight or, for `delta`, with the other one.

    Args:
        given: G or, for a delta that is no unit matrix, what stands in its place; (B, held, channels, *K). None: a unit matrix.
        held: rows of G.
        start: where `given` stands among the taps.
        noise: its noise.
        scales: root mean square of the noise, and what the factor is multiplied by; numbers, or (B, 1, 1) of `work`.
        room: working memory of `work`.
        work: what is computed in; tensors of it are mixed in place.
    """
    batch, hidden, channels, *size = out.shape
    if not out.numel():
        return
    taps = math.prod(size)
    width = max(1, in_a_range(out.device) // (batch * hidden * taps))
    inside = out.dtype == work and out.is_contiguous()
    centre = (start[0] * size[1] + start[1]) * size[2] + start[2]
    for at in range(0, channels, width):
        part = slice(at, min(at + width, channels))
        framed = None if given is None else _framed(given[:, :, part], size, start, room)
        target = out[:, :, part]
        into = target if inside else room("into", *target.shape)
        rows = noise(slice(at * taps, part.stop * taps), room)
        _mix(framed, rows, into.flatten(3), held, centre, at, scales, delta=delta)
        if not inside:
            target.copy_(into)


def _mix(
    given: Tensor | None,
    noise: Tensor,
    into: Tensor,
    held: int,
    centre: int,
    at: int,
    scales: tuple[Scale, Scale],
    *,
    delta: bool,
) -> None:
    """P of rows of G (B, held, n), or of a unit matrix at a tap, and of noise: (B, hidden, channels from `at` on, taps)."""
    batch, hidden, channels, taps = into.shape
    spread, gain = scales
    noisy = gain * spread
    columns = into.flatten(2)
    shared = (
        _shared(given, noise, held, centre, at, channels, taps, spread, hidden, delta) if shares_pairs(hidden, held) else None
    )
    for run in runs(hidden, held, delta, batch > 1, into.dtype, into.device):
        block, target = run.first, run.of(columns)
        beta = 0.0
        if given is not None and block.held:
            torch.bmm(_each(run.held * gain, target), _cut(given, block.row, run.number, block.held), out=target)
            beta = 1.0
        if shared is not None:
            rows = shared[:, run.rows[0]] if run.number == 1 else shared[0, run.rows]
            target.baddbmm_(run.noise * gain, rows, beta=beta)
        elif run.noise.shape[2]:
            rows = _cut(noise, block.pair, run.number, run.noise.shape[2])
            target.baddbmm_(_each(run.noise * noisy, target), rows, beta=beta)
        elif not beta:
            target.zero_()
    if given is None:
        channel, row, share, first = _unit(hidden, held, into.dtype, into.device)
        ours = slice(first[min(at, held)], first[min(at + channels, held)])
        tap = into.select(3, centre).permute(1, 2, 0)  # (hidden, channels, B)
        tap[channel[ours], row[ours] - at] += share[ours] * (gain if isinstance(gain, float) else gain.view(-1))


def _each(matrices: Tensor, target: Tensor) -> Tensor:
    return matrices.expand(len(target), -1, -1)


def _cut(rows: Tensor, start: int, count: int, size: int) -> Tensor:
    """(1 or B, rows, n) from `start` on, as `count` blocks: (count, size, n), or (B, size, n) for one block."""
    cut = rows[:, start : start + count * size]
    return cut if count == 1 else cut[0].view(count, size, rows.shape[2])


def _framed(given: Tensor, size: Sequence[int], start: Sequence[int], room: Room) -> Tensor:
    """(B, rows, channels, *K), behind `start` zeros in taps of `size`, as (B, rows, channels * taps) of the room's dtype."""
    whole = list(given.shape[3:]) == list(size)
    out = room("given", *given.shape[:3], *size)
    if whole and out.dtype == given.dtype:
        return given.flatten(2)
    if whole:
        out.copy_(given)
    else:
        window: tuple[Any, ...] = tuple(slice(a, a + n) for a, n in zip(start, given.shape[3:], strict=True))
        out.zero_()[(..., *window)] = given
    return out.flatten(2)


def _shared(
    given: Tensor | None,
    noise: Tensor,
    held: int,
    centre: int,
    at: int,
    channels: int,
    taps: int,
    spread: Scale,
    hidden: int,
    delta: bool,
) -> Tensor:
    """The rows that blocks take where they share pairs, (B, 4 * groups + 2, n): see `mixing`, and `runs` for their order.

    Two a group for its rows of G, pair sums less held sums; two a pair for its twins, held sums less; the odd one; zeros.
    """
    blocks, groups, pairs = deal(hidden, held), groups_of(hidden, held), (hidden - held) // 2
    batch, columns = len(noise), channels * taps
    out = noise.new_zeros((batch, 4 * groups + 2, columns))
    sums = out[:, 2 * groups : 4 * groups]
    for p, block in enumerate(blocks[:groups]):
        low, high = block.pair_low, block.pair_high
        u = _along(high - low, noise.dtype, noise.device)
        if given is not None:
            torch.matmul(u, given[:, low:high], out=sums[:, 2 * p : 2 * p + 2])
        elif max(low, at) < min(high, at + channels):
            low, high = max(low, at), min(high, at + channels)
            sums.view(batch, 2 * groups, channels, taps)[:, 2 * p : 2 * p + 2, low - at : high - at, centre] = u[
                :, low - block.pair_low : high - block.pair_low
            ]
    sums.mul_(-1.0)
    torch.mul(sums, 1.0 if pairs else 2.0, out=out[:, : 2 * groups])
    if pairs:  # the twins' sum in the weight's factor, their difference in the delta's
        out[:, int(delta) : 2 * groups : 2].add_(noise[:, :pairs] * (spread * _ROOT))
    if noise.shape[1] > pairs:
        out[:, -2:-1] = noise[:, -1:] * spread
    return out


@functools.lru_cache(maxsize=256)
def _along(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return along(size).to(device, dtype)


@functools.lru_cache(maxsize=256)
def runs(hidden: int, held: int, delta: bool, alone: bool, dtype: torch.dtype, device: torch.device) -> tuple[Run, ...]:
    """The blocks of P by runs of equal ones, with what they take of rows of G and of noise, twins added up or subtracted.

    Each block is `alone` where there is a batch, whose items are then what is mixed together.
    """
    shared, groups = shares_pairs(hidden, held), groups_of(hidden, held)
    table, found = mixing_table(torch.float64, torch.device("cpu")), []
    alike = itertools.groupby(deal(hidden, held), key=lambda b: (b.size, b.pairs, b.held, alone and b.start))
    for (size, pairs, rows, _), equal in alike:
        blocks = list(equal)
        p = table[size - 1, :size, :size].mT  # (size, size)
        one, two, ours = p[:, :pairs], p[:, pairs : 2 * pairs], p[:, 2 * pairs : 2 * pairs + rows]
        single = 2 * pairs + rows < size and not delta
        taken, places = one - two if delta else one + two, []
        if shared:
            taken = p.new_zeros(len(blocks), size, 5)
            for k, block in enumerate(blocks):
                inside = slice(max(block.low, block.row), min(block.high, block.row + rows))
                u = along(block.high - block.low)[:, inside.start - block.low : inside.stop - block.low]
                taken[k, :, :2] = ours[:, inside.start - block.row : inside.stop - block.row] @ u.mT
                places.append([2 * block.group, 2 * block.group + 1, *[4 * groups + 1] * 3])
                if pairs:
                    taken[k, :, 2], taken[k, :, 3] = (one + two)[:, 0] / _ROOT, (one - two)[:, 0] / _ROOT
                    places[-1][2:4] = 2 * groups + 2 * block.pair, 2 * groups + 2 * block.pair + 1
                if single:
                    taken[k, :, 4], places[-1][4] = p[:, -1], 4 * groups
        elif single:
            taken = torch.cat([taken, p[:, -1:]], 1)
        noise, held_part = (taken if shared else taken[None]).to(device, dtype), ours[None].to(device, dtype)
        found.append(Run(blocks[0], len(blocks), held_part, noise, torch.tensor(places, device="cpu").to(device)))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _unit(hidden: int, held: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """B of a unit matrix: hidden channels, rows of G, entries (n, 1); and where the entries of each row begin."""
    table, first = mixing_table(torch.float64, torch.device("cpu")), [0]
    channels, rows, entries = [], [], []
    for block in deal(hidden, held):
        for j in range(block.held):
            channels.append(torch.arange(block.start, block.start + block.size, device="cpu"))
            rows.append(torch.full((block.size,), block.row + j, device="cpu"))
            entries.append(table[block.size - 1, 2 * block.pairs + j, : block.size])
            first.append(first[-1] + block.size)
    none = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    where = (torch.cat(part or none).to(device, non_blocking=True) for part in (channels, rows))
    values = torch.cat(entries) if entries else torch.zeros(0, dtype=torch.float64, device="cpu")
    channels_out, rows_out = where
    return channels_out, rows_out, values.to(dtype).to(device, non_blocking=True)[:, None], first
