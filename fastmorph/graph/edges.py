"""Ties of atoms as arrays of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Edges = np.ndarray[Any, np.dtype[np.int64]]  # (n, 2), pairs of atoms
NO_EDGES: Edges = np.zeros((0, 2), np.int64)


def edges(one: Tensor, two: Tensor) -> Edges:
    """The pairs of atoms at equal positions of two labels that broadcast."""
    one, two = torch.broadcast_tensors(one, two)
    pairs = np.stack([one.numpy().reshape(-1), two.numpy().reshape(-1)], 1)
    return pairs if not len(pairs) or pairs.min() >= 0 else pairs[(pairs >= 0).all(1)]


def chain(lines: Tensor) -> Edges:
    """Ties neighbours in each row of (*, n) labels."""
    return edges(lines[..., :-1], lines[..., 1:])


def unique(pairs: Edges) -> Edges:
    """Undirected, each once, without loops, sorted."""
    if not len(pairs):
        return pairs
    low, high = np.minimum(pairs[:, 0], pairs[:, 1]), np.maximum(pairs[:, 0], pairs[:, 1])
    bits = int(high.max()).bit_length()
    # As one number, which sorts much faster than pairs; and they come in few runs, which a merge sort makes use of.
    keys = np.sort(((low << bits) | high)[low != high], kind="stable")
    keys = keys[np.append(True, np.diff(keys) > 0)[: len(keys)]]
    return np.stack([keys >> bits, keys & ((1 << bits) - 1)], 1)
