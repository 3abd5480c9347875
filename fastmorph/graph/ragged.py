"""Rows of different lengths, compared all at once."""

from __future__ import annotations

from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


def scrambled(numbers: Ints) -> Ints:
    """For each number one of 64 bits that looks random, the same every time (SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        bits = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (bits ^ (bits >> np.uint64(31))).view(np.int64)


def positions(lengths: Ints) -> Ints:
    """0, 1, ... in each of the rows of these lengths, (sum of lengths,)."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def first_alike(lengths: Ints, *columns: Ints) -> Ints:
    """For each row the first one that holds the same, (n,).

    Sums of scrambled entries find candidates; these are then compared entry by entry, so that the answer is exact.

    Args:
        lengths: (n,), of the rows.
        columns: what stands in them, one row behind the other, each (sum of lengths,).
    """
    starts = np.append(0, np.cumsum(lengths))
    sums = lengths.copy()
    within = positions(lengths)
    for column in columns:
        running = np.append(0, np.cumsum(scrambled(scrambled(column) + within)))
        sums = scrambled(sums) + running[starts[1:]] - running[starts[:-1]]
    found = np.arange(len(lengths))
    order = np.lexsort((found, sums))
    while len(order):  # once, but where sums of other rows agree
        leads = np.append(True, np.diff(sums[order]) != 0)
        first = order[np.maximum.accumulate(np.where(leads, np.arange(len(order)), 0))]
        same = _alike(first, order, lengths, starts, columns)
        found[order[same]] = first[same]
        order = order[~same]
    return found


def _alike(one: Ints, two: Ints, lengths: Ints, starts: Ints, columns: tuple[Ints, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether rows `one` hold what rows `two` do."""
    alike: np.ndarray[Any, np.dtype[np.bool_]] = lengths[one] == lengths[two]
    sizes = np.where(alike, lengths[two], 0)
    row, within = np.repeat(np.arange(len(two)), sizes), positions(sizes)
    here, there = starts[two][row] + within, starts[one][row] + within
    for column in columns:
        alike[row[column[here] != column[there]]] = False
    return alike
