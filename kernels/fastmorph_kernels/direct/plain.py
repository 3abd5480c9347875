"""The closed form in plain PyTorch, for a CPU without Triton: the same P as the kernels have, other noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .mixing import deal, groups_of, mixing_table, shares_pairs


def fill_factor(weight: Tensor | None, out: Tensor, held: int, start: Sequence[int], seeds: Tensor, scales: Tensor) -> None:
    """Fill `out` (B, hidden, channels, x, y, z) as `launch_direct` does: from `weight`, or from a delta where it is None."""
    _, hidden, channels, *size = out.shape
    rows = scales.new_zeros(out.shape)
    window = tuple(slice(a, a + n) for a, n in zip(start, (1, 1, 1) if weight is None else weight.shape[3:], strict=True))
    generators = [torch.Generator().manual_seed((2 * seed + (weight is None)) % 2**63) for seed in seeds.tolist()]
    for block in deal(hidden, held):
        one, two, three = (block.start + twins * block.pairs for twins in range(3))
        end = three + block.held
        for item, generator in enumerate(generators):
            noise = torch.randn(two - one, channels, *size, generator=generator) * scales[item, 0]
            rows[item, one:two], rows[item, two:three] = noise, -noise if weight is None else noise
            if weight is not None and end < block.start + block.size:
                rows[item, end] = torch.randn(channels, *size, generator=generator) * scales[item, 0]
        ours = slice(block.row, block.row + block.held)
        if weight is None:
            unit = torch.eye(held, dtype=rows.dtype)[ours]
            rows[(slice(None), slice(three, end), slice(None), *window)] = unit[..., None, None, None]
        else:
            rows[(slice(None), slice(three, end), slice(None), *window)] = weight[:, ours].to(rows.dtype)
    mixed = mix(rows.flatten(2), held) * scales[:, 1, None, None]
    out.copy_(mixed.view(out.shape))


def mix(rows: Tensor, held: int) -> Tensor:
    """P rows, (B, hidden, n) -> (B, hidden, n), where `held` of the rows are those of G."""
    hidden = rows.shape[1]
    if shares_pairs(hidden, held):
        u, e = (x.to(rows) for x in directions(hidden, held))
        held_sums, pair_sums = u.mT @ rows, e.mT @ rows
        if hidden - held < 2:
            rows = rows - 2.0 * (u @ held_sums)
        else:
            rows = rows + u @ (pair_sums - held_sums) - e @ (held_sums + pair_sums)
    table, out = mixing_table(rows.dtype, rows.device), torch.empty_like(rows)
    for block in deal(hidden, held):
        channels = slice(block.start, block.start + block.size)
        out[:, channels] = table[block.size - 1, : block.size, : block.size].mT @ rows[:, channels]
    return out


def directions(hidden: int, held: int) -> tuple[Tensor, Tensor]:
    """U and E, (hidden, 2 * groups) float64; u_t is constant, u_d has one value on even rows of its group, one on odd ones."""
    blocks, groups = deal(hidden, held), groups_of(hidden, held)
    channels = torch.cat([torch.arange(b.held) + b.start + 2 * b.pairs for b in blocks])  # of the rows of G
    u, e = torch.zeros(2, hidden, 2 * groups, dtype=torch.float64)
    for p, block in enumerate(blocks[:groups]):
        rows = channels[block.pair_low : block.pair_high]
        size, odd = len(rows), len(rows) // 2
        u[rows, 2 * p] = size**-0.5
        u[rows[0::2], 2 * p + 1] = (odd / ((size - odd) * size)) ** 0.5
        u[rows[1::2], 2 * p + 1] = -(((size - odd) / (odd * size)) ** 0.5)
        if block.pairs:
            e[block.start : block.start + 2, 2 * p] = 0.5**0.5
            e[block.start, 2 * p + 1], e[block.start + 1, 2 * p + 1] = 0.5**0.5, -(0.5**0.5)
    return u, e
