"""Weights to be filled: layers whose channels double by twins, on both sides."""

from __future__ import annotations

import numpy as np
from fastmorph_kernels.fill import DRAWN, MIRRORED, OLD, Dimension


def doubled(channels: int, seed: int) -> list[Dimension]:
    """Both dimensions of channels of a weight (O, I, *K), in the order in which they are filled."""
    half = channels // 2
    kind = np.repeat([OLD, DRAWN, MIRRORED], [channels, half, channels - half])
    place = np.concatenate([np.arange(channels), np.arange(half), np.arange(channels - half)])
    row = place + np.where(kind == MIRRORED, channels, 0)
    columns = Dimension(1, kind, place, row, half, 2 * seed, 0.1, sign=-1, follows=True)
    return [columns, Dimension(0, kind, place, row, half, 2 * seed + 1, 0.1, leads=True)]
