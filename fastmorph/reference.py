"""The oracle: the morphism equation and the algorithms of the paper in plain numpy float64.

Written to be read beside Wei, Wang, Rui and Chen, "Network Morphism" (ICML 2016). One problem at a time, dense matrices,
`numpy.linalg.lstsq`, no tricks: every test compares with it and every benchmark starts from it.

Shapes: weight G (Co, Ci, *K); first kernel F1 (Ch, Ci, *K1); second kernel F2 (Co, Ch, *K2); frame N = K1 + K2 - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmorph.frame import Frame, at, taps, volume, window

Array = NDArray[Any]  # float64
Draw = Callable[..., Array]  # draw(*shape): standard normal noise


class Solved(NamedTuple):
    """Two kernels, and the relative residual after each half-step that led to them."""

    first: Array
    second: Array
    trace: list[float]


def compose(first: Array, second: Array) -> Array:
    """Right-hand side of the network morphism equation: sum over h, v of F2[o, h, v] * F1[h, i, u - v].

    (Ch, Ci, *K1), (Co, Ch, *K2) -> (Co, Ci, *N).
    """
    k1, k2 = first.shape[2:], second.shape[2:]
    out = np.zeros((second.shape[0], first.shape[1], *(a + b - 1 for a, b in zip(k1, k2, strict=True))))
    for v in taps(k2):
        out[(..., *window(v, k1))] += np.einsum("oh,hi...->oi...", second[at(v)], first)
    return out


def start(draw: Draw, hidden: int, ci: int, k1: tuple[int, ...]) -> Array:
    """Algorithm 1, line 1: noise for F1, (Ch, Ci, *K1), of the spread that keeps a signal's variance."""
    return draw(hidden, ci, *k1) / np.sqrt(ci * volume(k1))


def pad_to_frame(weight: Array, frame: Frame) -> Array:
    """Algorithm 1, line 2: G with zeros around it, (Co, Ci, *K) -> (Co, Ci, *N)."""
    return np.pad(weight, [(0, 0), (0, 0), *zip(frame.before, frame.after, strict=True)])


def dense_system(first: Array, k2: tuple[int, ...]) -> Array:
    """The matrix A of F2 A = G for a fixed F1, block Toeplitz: (Ch * |K2|, Ci * |N|)."""
    k1 = first.shape[2:]
    n = tuple(a + b - 1 for a, b in zip(k1, k2, strict=True))
    system = np.zeros((first.shape[0], *k2, first.shape[1], *n))
    for v in taps(k2):
        system[(slice(None), *v, slice(None), *window(v, k1))] = first
    return system.reshape(first.shape[0] * volume(k2), first.shape[1] * volume(n))


def solve_second(padded: Array, first: Array, k2: tuple[int, ...]) -> Array:
    """Algorithm 1, line 4: F1 fixed, the least-squares F2 of smallest norm ("deconvolution")."""
    system = dense_system(first, k2)
    target = padded.reshape(padded.shape[0], -1)
    solution = np.linalg.lstsq(system.T, target.T, rcond=None)[0].T
    return solution.reshape(padded.shape[0], first.shape[0], *k2)


def solve_first(padded: Array, second: Array, k1: tuple[int, ...]) -> Array:
    """Algorithm 1, line 5: F2 fixed, the least-squares F1; the same step on the transposed equation."""
    return solve_second(padded.swapaxes(0, 1), second.swapaxes(0, 1), k1).swapaxes(0, 1)


def relative_residual(padded: Array, first: Array, second: Array) -> float:
    """Algorithm 1, line 6: the loss, as ||G - F2 * F1|| / ||G|| (Frobenius); absolute where G is zero."""
    norm = np.linalg.norm(padded)
    return float(np.linalg.norm(padded - compose(first, second)) / (norm if norm > 0 else 1.0))


def equalise(first: Array, second: Array) -> tuple[Array, Array]:
    """Algorithm 1, line 8: scale both kernels to one standard deviation, their composition unchanged."""
    spread1, spread2 = first.std(), second.std()
    scale = np.sqrt(spread2 / spread1) if spread1 > 0 and spread2 > 0 else 1.0
    return first * scale, second / scale


def half_step(weight: Array, first: Array, frame: Frame) -> Solved:
    """One half-step for F2, exact where Claim 1 holds: Ch * |K2| >= Ci * |N| (and F1 has full rank)."""
    padded = pad_to_frame(weight, frame)
    second = solve_second(padded, first, frame.second)
    trace = [relative_residual(padded, first, second)]
    return Solved(*equalise(first, second), trace)


def general(weight: Array, first: Array, frame: Frame, *, max_iter: int, tol: float) -> Solved:
    """Algorithm 1, general network morphism, from the noise `first` (line 1)."""
    padded = pad_to_frame(weight, frame)  # line 2
    trace: list[float] = []
    for _ in range(max_iter):  # line 3
        second = solve_second(padded, first, frame.second)  # line 4
        trace.append(relative_residual(padded, first, second))
        if trace[-1] <= tol:
            break  # the loss is 0 already: the noise F1 is kept, where line 5 would turn it to zeros if G is zero
        first = solve_first(padded, second, frame.first)  # line 5
        trace.append(relative_residual(padded, first, second))  # line 6
        if trace[-1] <= tol:  # line 7
            break
    return Solved(*equalise(first, second), trace)  # line 8


def practical(weight: Array, first: Array, frame: Frame, *, tol: float, max_iter: int = 1) -> Solved:
    """Algorithm 2, practical network morphism: shrink K2 until one sweep of Algorithm 1 is exact, then pad it back.

    It ends with loss 0 at |K2| = 1 at the latest, if K1 >= K and Ch >= Co.
    """
    trace: list[float] = []
    for inner in frame.shrinking():  # lines 2, 3 and 5
        found = general(weight, first, inner, max_iter=max_iter, tol=tol)  # line 4
        trace += found.trace
        if trace[-1] <= tol:  # line 6
            break
    second = np.pad(found.second, [(0, 0), (0, 0), *frame.second_padding(inner)])  # line 7
    return Solved(*equalise(found.first, second), trace)  # line 8


def direct(weight: Array, hidden: int, frame: Frame, draw: Draw, density: float) -> Solved:
    """Closed form for K1 >= K: F1 = P [V; S; S] and F2 = [U | R | -R] P^T with G = U V, P orthogonal, S and R noise.

    U = I and V = G where Ch >= Co; else the singular value decomposition of G, exact if its rank is at most Ch.
    """
    co, ci = weight.shape[:2]
    left, right = np.eye(co), weight
    if hidden < co:
        u, s, vh = np.linalg.svd(weight.reshape(co, -1), full_matrices=False)
        rank = max(1, min(hidden, int(np.sum(s > s.max() * co * np.finfo(float).eps))))
        left, right = u[:, :rank], (s[:rank, None] * vh[:rank]).reshape(rank, *weight.shape[1:])
    rank = len(right)
    pairs, single = divmod(hidden - rank, 2)
    centre = tuple((k - 1) // 2 for k in frame.second)
    offset = tuple(b - c for b, c in zip(frame.before, centre, strict=True))

    held = np.zeros((rank, ci, *frame.first))
    held[(..., *window(offset, frame.kernel))] = right
    spread = right.std() or start(draw, hidden, ci, frame.first).std()
    s, odd = spread * draw(pairs, ci, *frame.first), spread * draw(single, ci, *frame.first)
    delta = np.zeros((co, rank, *frame.second))
    delta[at(centre)] = left
    r = density * np.sqrt(rank / (2 * max(1, pairs) * co)) * draw(co, pairs, *frame.second)
    p = np.linalg.qr(draw(hidden, hidden))[0]
    first = np.tensordot(p, np.concatenate([held, s, s, odd]), axes=1)
    unmixed = np.concatenate([delta, r, -r, np.zeros((co, single, *frame.second))], axis=1)
    second = np.moveaxis(np.tensordot(unmixed, p, axes=([1], [1])), -1, 1)
    return Solved(*equalise(first, second), [])
