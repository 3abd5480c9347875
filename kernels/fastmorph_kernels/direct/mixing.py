"""The orthogonal matrix P of the closed form: how hidden channels are dealt to its blocks, and what stands in them.

P = B W. B is block diagonal, with blocks of at most 32 channels, so that one program mixes a block on the chip, and a CPU has
few products to take. Every block of one size is the same fixed orthogonal matrix: what it mixes is noise, or a weight that
knows nothing of it. All backends have this P, so that their answers agree to rounding.

A block holds its share of the pairs, [S; S] (twins together), and of the rows of the weight G. Mixing gives the pairs'
noise to all of its rows, and W is the identity. Where there are fewer pairs than blocks, W must bring each pair to several
blocks, a *group*. A group has two orthonormal directions u_t and u_d over its rows of G; with t the normalised sum of its
pair's twins and d their difference, W turns (t, u_t) and (d, u_d) by a right angle:

    W = I - U U^T - E E^T - E U^T + U E^T          U = [u_t, u_d, ...], E = [t, d, ...]

The twins give their noise to every row of the group, and take the sums U^T G for it. To sum over all rows cannot be
avoided: noise in all of F2 cancels only where a dense combination of the rows of F1 is zero. Where there is no pair at all,
there is one group, and W = I - 2 U U^T spreads the unit matrix.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 32  # hidden channels in a block, at most


class MixingBlock(NamedTuple):
    """One block of P. Its channels are the first twins of its pairs, their second twins, then rows of G.

    An odd extra channel follows the last row of G.
    """

    start: int  # first hidden channel
    size: int  # hidden channels
    pairs: int
    row: int  # first row of G
    held: int  # rows of G
    group: int  # which group it belongs to; groups are empty where no pair is shared
    low: int  # first row of G of that group
    high: int  # end of the rows of G of that group
    pair_low: int  # the same of the group whose pair this block holds; of group k in block k, where there is a group k
    pair_high: int
    pair: int  # first pair


def shares_pairs(hidden: int, held: int) -> bool:
    """Whether blocks share pairs, because there are fewer of these."""
    return (hidden - held) // 2 < _count(hidden) > 1


def groups_of(hidden: int, held: int) -> int:
    """How many groups share pairs."""
    return max(1, (hidden - held) // 2) if shares_pairs(hidden, held) else 0


@functools.cache
def deal(hidden: int, held: int) -> tuple[MixingBlock, ...]:
    """Deal hidden channels to blocks by twos (an odd one goes to the last block), and pairs with them, as evenly as can be."""
    count, pairs, groups = _count(hidden), (hidden - held) // 2, groups_of(hidden, held)
    starts = [2 * _before(hidden // 2, k, count) for k in range(count)] + [hidden]
    firsts = [_before(pairs, k, count) for k in range(count + 1)]
    rows = [min(start - 2 * first, held) for start, first in zip(starts, firsts, strict=True)]
    bounds = [rows[-(-p * count // groups)] for p in range(groups + 1)] if groups else []
    spans = list(itertools.pairwise(bounds)) + [(0, 0)] * (count - groups)
    blocks = []
    for k in range(count):
        group = k * groups // count
        sizes = starts[k + 1] - starts[k], firsts[k + 1] - firsts[k], rows[k], rows[k + 1] - rows[k]
        blocks.append(MixingBlock(starts[k], *sizes, group, *spans[group], *spans[k], firsts[k]))
    return tuple(blocks)


def _count(hidden: int) -> int:
    return max(1, -(-hidden // SIDE))


def _before(things: int, k: int, blocks: int) -> int:
    """How many of `things`, dealt evenly, blocks before block k have."""
    each, more = divmod(things, blocks)
    return k * each + min(k, more)


@functools.cache  # for good: a captured CUDA graph may hold the table's address
def dealing_table(hidden: int, held: int, device: torch.device) -> Tensor:
    """`deal` as a tensor (blocks, fields of MixingBlock) int32."""
    return torch.tensor(deal(hidden, held), dtype=torch.int32, device="cpu").to(device)


@functools.cache
def mixing_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """P^T of a block of each size from 1 on, (SIDE, SIDE, SIDE): row j holds what every hidden channel takes of row j."""
    table = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.float64, device="cpu")
    for size in range(1, SIDE + 1):
        noise = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64, device="cpu")
        table[size - 1, :size, :size] = torch.linalg.qr(noise)[0]
    return table.to(device, dtype)


def mixing_matrix(hidden: int, held: int) -> Tensor:
    """P itself, (hidden, hidden) float64.

    Its columns belong to the rows of G, then to the pairs' first twins, their second twins, and the odd extra channel.
    """
    blocks, pairs = deal(hidden, held), (hidden - held) // 2
    table, dealt = (
        mixing_table(torch.float64, torch.device("cpu")),
        torch.zeros(hidden, hidden, dtype=torch.float64, device="cpu"),
    )
    order: list[int] = [0] * hidden  # where in the blocks a column is
    for block in blocks:
        ours = slice(block.start, block.start + block.size)
        dealt[ours, ours] = table[block.size - 1, : block.size, : block.size].mT
        for j in range(block.pairs):
            order[held + block.pair + j] = block.start + j
            order[held + pairs + block.pair + j] = block.start + block.pairs + j
        order[block.row : block.row + block.held] = range(
            ours.start + 2 * block.pairs, ours.start + 2 * block.pairs + block.held
        )
        if 2 * block.pairs + block.held < block.size:
            order[-1] = ours.stop - 1
    if shares_pairs(hidden, held):
        u, e = directions(hidden, held)
        taken = 2.0 * u @ u.mT if hidden - held < 2 else u @ u.mT + e @ e.mT + e @ u.mT - u @ e.mT
        dealt = dealt - dealt @ taken
    return dealt[:, order]


def directions(hidden: int, held: int) -> tuple[Tensor, Tensor]:
    """U and E, (hidden, 2 * groups) float64; u_t is constant, u_d has one value on even rows of its group, one on odd ones."""
    blocks, groups = deal(hidden, held), groups_of(hidden, held)
    channels = torch.cat([torch.arange(b.held, device="cpu") + b.start + 2 * b.pairs for b in blocks])  # of the rows of G
    u, e = torch.zeros(2, hidden, 2 * groups, dtype=torch.float64, device="cpu")
    for p, block in enumerate(blocks[:groups]):
        rows = channels[block.pair_low : block.pair_high]
        u[rows, 2 * p], u[rows, 2 * p + 1] = along(len(rows))
        if block.pairs:
            e[block.start : block.start + 2, 2 * p] = 0.5**0.5
            e[block.start, 2 * p + 1], e[block.start + 1, 2 * p + 1] = 0.5**0.5, -(0.5**0.5)
    return u, e


def along(size: int) -> Tensor:
    """u_t and u_d over the rows of a group, (2, size) float64."""
    odd = size // 2
    both = torch.full((2, size), size**-0.5, dtype=torch.float64, device="cpu")
    if size > 1:
        both[1, 0::2] = (odd / ((size - odd) * size)) ** 0.5
        both[1, 1::2] = -(((size - odd) / (odd * size)) ** 0.5)
    return both
