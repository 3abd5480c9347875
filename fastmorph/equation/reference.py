"""The oracle: the morphism equation and the algorithms of the paper in plain numpy float64.

Written to be read beside Wei, Wang, Rui and Chen, "Network Morphism" (ICML 2016). One problem at a time, dense matrices,
`numpy.linalg.lstsq`, no tricks: every test compares with it and every benchmark starts from it.

Shapes: weight G (Co, Ci, *K); first kernel F1 (Ch, Ci, *K1); second kernel F2 (Co, Ch, *K2); frame N = K1 + K2 - 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmorph.equation.frame import Frame, one_tap, tap_count, taps, window

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
        out[(..., *window(v, k1))] += np.einsum("oh,hi...->oi...", second[one_tap(v)], first)
    return out


def start(draw: Draw, hidden: int, ci: int, k1: tuple[int, ...]) -> Array:
    """Algorithm 1, line 1: noise for F1, (Ch, Ci, *K1), of the spread that keeps a signal's variance."""
    return draw(hidden, ci, *k1) / np.sqrt(ci * tap_count(k1))


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
    return system.reshape(first.shape[0] * tap_count(k2), first.shape[1] * tap_count(n))


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


def general_anderson(
    weight: Array, first: Array, frame: Frame, *, max_iter: int, tol: float, memory: int = 20, growth: float = 1.5
) -> Solved:
    """Algorithm 1 with Anderson acceleration of the map F1 -> F1' of one sweep (Walker and Ni 2011).

    Hidden channels of F1 keep norm 1. A step that lets the residual grow by half is taken back, and the memory cleared.
    """
    padded, point = pad_to_frame(weight, frame), _unit(first)
    best = Solved(point, np.zeros((len(weight), len(first), *frame.second)), [np.inf])
    pairs: list[tuple[Array, Array]] = []  # (F1, F1') of the last sweeps
    last, trace, half_steps = np.inf, [], 0
    while half_steps < 2 * max_iter:
        second = solve_second(padded, point, frame.second)
        trace.append(relative_residual(padded, point, second))
        half_steps += 1
        best = min(best, Solved(point, second, trace[-1:]), key=lambda found: found.trace)
        if trace[-1] <= tol:
            break
        if trace[-1] > growth * last:
            point, pairs, last = pairs[-1][1], [], np.inf
            continue
        last = trace[-1]
        image = _unit(solve_first(padded, second, frame.first))
        half_steps += 1
        pairs = [*pairs[-memory:], (point, image)]
        moves = np.stack([(b - a).ravel() for a, b in pairs], axis=1)
        images = np.stack([b.ravel() for _, b in pairs], axis=1)
        share = np.linalg.lstsq(np.diff(moves), moves[:, -1], rcond=None)[0]
        point = _unit(image - (np.diff(images) @ share).reshape(image.shape))
    return Solved(*equalise(best.first, best.second), trace)


def general_gauss_newton(weight: Array, first: Array, frame: Frame, *, max_iter: int, tol: float) -> Solved:
    """Algorithm 1 with F2 eliminated: Levenberg-Marquardt steps on F1 alone (Golub and Pereyra 1973, Kaufman 1975).

    F2 is always the least-squares kernel for F1. A change d of F1 changes the residual by -J d, where J composes d with F2 and
    takes out what another F2 could absorb. One trial of a step counts as a sweep.
    """
    padded, first = pad_to_frame(weight, frame), _unit(first)
    second = solve_second(padded, first, frame.second)
    trace, damping = [relative_residual(padded, first, second)], 1e-2
    for _ in range(max_iter - 1):
        if trace[-1] <= tol:
            break
        (ch, ci), (co, n) = first.shape[:2], (len(padded), tap_count(frame.size))
        row_space = np.linalg.svd(dense_system(first, frame.second), full_matrices=False)
        rows = row_space[2][row_space[1] > 1e-12 * row_space[1][0]]
        complement = (np.eye(ci * n) - rows.T @ rows).reshape(ci, n, ci * n)
        onto = dense_system(second.swapaxes(0, 1), frame.first).reshape(-1, co, n)  # F1's (h, w) -> (o, u), at each i
        jacobian = np.einsum("xou,iuj->ojxi", onto, complement, optimize=True).reshape(co * ci * n, -1)
        error = (padded - compose(first, second)).reshape(-1)
        ridge = np.sqrt(damping) * trace[-1] * np.linalg.norm(jacobian, axis=0).max() * np.eye(jacobian.shape[1])
        step = np.linalg.lstsq(np.vstack([jacobian, ridge]), np.append(error, np.zeros(len(ridge))), rcond=None)[0]
        step = step.reshape(ch, *frame.first, ci)  # rows of dense_system run over h, then the taps of F1
        trial = _unit(first + np.moveaxis(step, -1, 1))
        found = solve_second(padded, trial, frame.second)
        residual = relative_residual(padded, trial, found)
        if residual < trace[-1]:
            first, second, damping = trial, found, damping / 3
        else:
            damping *= 4
        trace.append(min(residual, trace[-1]))
    return Solved(*equalise(first, second), trace)


def _unit(first: Array) -> Array:
    """F1 with hidden channels of norm 1; F2 takes the scale back."""
    norms = np.linalg.norm(first.reshape(len(first), -1), axis=1)
    return first / np.maximum(norms, 1e-30).reshape(-1, *(1,) * (first.ndim - 1))


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
    """Closed form for K1 >= K: F1 = P [V; S; S; s], F2 = [U | R | -R | 0] P^T with G = U V, P orthogonal, S, s and R noise.

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
    extras, taps1, taps2 = hidden - rank, tap_count(frame.first), tap_count(frame.second)
    centre: tuple[Any, ...] = tuple((k - 1) // 2 for k in frame.second)
    offset = tuple(b - c for b, c in zip(frame.before, centre, strict=True))

    held = np.zeros((rank, ci, *frame.first))
    held[(..., *window(offset, frame.kernel))] = right
    lines = right[:: max(1, rank // 32), :: max(1, ci // 32)]
    spread = np.sqrt(np.mean(lines**2)) or (ci * taps1) ** -0.5
    s = spread * draw(extras - pairs, ci, *frame.first)
    delta = np.zeros((rank, co, *frame.second))
    delta[(..., *centre)] = left.T
    r = density * np.sqrt(rank / (2 * max(1, pairs) * co)) * draw(pairs, co, *frame.second)
    p = importlib.import_module("fastmorph_kernels.direct.mixing").mixing_matrix(hidden, rank).numpy()
    first = np.tensordot(p, np.concatenate([held, s[:pairs], s]), axes=1)
    second = np.tensordot(p, np.concatenate([delta, r, -r, np.zeros((single, co, *frame.second))]), axes=1)
    # P keeps norms: scaled by this, both come out with one root mean square, as far as noise has its expectation.
    power1 = spread**2 * (rank * ci * tap_count(frame.kernel) + extras * ci * taps1) / (ci * taps1)
    power2 = rank / co * (1.0 + (density**2 * taps2 if pairs else 0.0)) / taps2
    gain = (power2 / power1) ** 0.25
    return Solved(gain * first, np.moveaxis(second, 0, 1) / gain, [])
