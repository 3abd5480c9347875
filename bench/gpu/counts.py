"""The operations that no algorithm of this kind can leave out, a multiplication and an addition counted as two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

from fastmorph.equation.frame import Frame


def half_step(co: int, ch: int, ci: int, frame: Frame) -> float:
    """One half-step for F2 with the norm of what it leaves: Gram matrix, right-hand side, factor, solution, composition.

    On the cheaper of its two sides: A A^T with a row for each unknown of F2, or A^T A with one for each place of the frame,
    whose factor is banded, and whose solution F1 must still take to F2. The zeros around the weight are not multiplied.
    """
    k, k1, k2, n = frame.kernel, frame.first, frame.second, frame.size
    unknowns, equations = ch * prod(k2), ci * prod(n)
    by_rows = row_gram(ch, ci, k1, k2) + correlation(co, ch, ci, k, k1, k2, frame.before)
    by_rows += unknowns**3 / 3 + 2.0 * unknowns**2 * co
    blocks, width = (n[0], k1[0] - 1) if n else (1, 0)
    by_columns = column_gram(ch, ci, k1) + banded_factor(equations, blocks, width)
    by_columns += banded_solution(equations, co, blocks, width) + composition(co, ch, ci, k1, k2)
    return min(by_rows, by_columns) + composition(co, ch, ci, k1, k2)


def composition(co: int, ch: int, ci: int, k1: Sequence[int], k2: Sequence[int]) -> float:
    """F2 * F1."""
    return 2.0 * co * ch * ci * prod(k1) * prod(k2)


def correlation(
    co: int, ch: int, ci: int, k: Sequence[int], k1: Sequence[int], k2: Sequence[int], before: Sequence[int]
) -> float:
    """The adjoint of the composition, for a target of size K behind `before` zeros."""
    pairs = 1
    for size, one, two, zeros in zip(k, k1, k2, before, strict=True):
        pairs *= sum(zeros <= v + w < zeros + size for v in range(two) for w in range(one))
    return 2.0 * co * ch * ci * pairs


def row_gram(ch: int, ci: int, k1: Sequence[int], k2: Sequence[int]) -> float:
    """A A^T: each lag v - v' once, of which opposite ones are transposes, and lag zero is symmetric."""
    overlaps = [
        prod(max(0, size - abs(d)) for size, d in zip(k1, lag, strict=True))
        for lag in itertools.product(*(range(1 - two, two) for two in k2))
    ]
    half = (sum(overlaps) - prod(k1)) / 2
    return 2.0 * ci * (half * ch**2 + prod(k1) * ch * (ch + 1) / 2)


def column_gram(ch: int, ci: int, k1: Sequence[int]) -> float:
    """A^T A: one symmetric product over the hidden channels. Its shifted copies are added up at the speed of memory."""
    side = ci * prod(k1)
    return 1.0 * ch * side * (side + 1)


def banded_factor(size: int, blocks: int, width: int) -> float:
    """Cholesky of `size` rows in so many blocks that are zero further than `width` from the diagonal."""
    products = 0.0
    for i in range(blocks):
        for j in range(max(0, i - width), i + 1):
            before = j - max(0, i - width)
            products += before + 1 / 3 if j == i else 2 * before + 1
    return products * (size / blocks) ** 3


def banded_solution(size: int, columns: int, blocks: int, width: int) -> float:
    """Both substitutions with such a factor."""
    below = sum(min(i, width) for i in range(blocks))
    return 2.0 * columns * (2 * below + blocks) * (size / blocks) ** 2
