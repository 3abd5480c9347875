"""A closed form: where the whole weight fits into one of the two kernels, no equation need be solved.

With e = C_hid - r extra channels, m = e // 2 of them in pairs,

    F1 = P [G; S; S],   F2 = [I | R | -R] P^T,

where S and R are noise, I is a delta kernel that puts G where the frame has it, and P is orthogonal over the hidden channels.
F2 * F1 = I * G + R * S - R * S = G whatever S, R and P are. P mixes the three groups, so that no entry stays zero and no
channel stays a copy of another. It is block-diagonal, so that mixing costs little more than the memory that it touches: blocks
of a few channels where each gets noise, about sqrt(C_hid) wide where the extra channels are too few for that.

r = C_out and [I; G] in general; where C_hid is smaller than that, G = U V by a singular value decomposition, with r its rank.
The other role, the weight in F2, is the same on the transposed equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.backends.torch_backend import frobenius
from fastmorph.equation.bounds import may_have_rank, numerical_rank, refuse_below_rank, tail_norms, tolerance
from fastmorph.equation.frame import Frame, Side, tap_count, window
from fastmorph.equation.solvers.base import Choice, Equation, Solution, Solver
from fastmorph.errors import MorphError

# Numbers in the working memory of one range of channels: what stays in a CPU's cache, and what fills another device.
_NUMBERS_CPU, _NUMBERS = 2**17, 2**24
_SMALLEST_BLOCK = 8  # below this a block is dense anyway and a product of its size costs only its launch


@dataclass(frozen=True)
class Direct(Solver):
    """Closed form, exact to rounding where K1 >= K and C_hid >= C_out, or K2 >= K and C_hid >= C_in; else by low rank.

    Time grows with the number of weights. The condition is perfect: no system is solved. Memory, besides the weight and both
    kernels in its dtype: a few ranges of channels, 1 MB each on a CPU, 128 MB elsewhere; for the short dtypes, where F2 is
    corrected, and for low rank, the working copies of a half-step and of a singular value decomposition.

    Attributes:
        density: root mean square, in (0, 1], that noise gives to every tap of the kernel that does not hold the weight,
            relative to what the delta gives to its centre tap. Larger spreads that kernel more evenly; rounding grows with it.
    """

    density: float = 0.5
    closed_form: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise MorphError(f"Direct(density={self.density}): density must lie in (0, 1].")

    @staticmethod
    def role(frame: Frame, co: int, ci: int, hidden: int) -> Side | None:
        """Which kernel any weight of these sizes can go into; None: exact in neither, except for weights of low rank."""
        taps = tap_count(frame.kernel)
        if frame.fits(within_first=True) and hidden >= min(co, ci * taps):
            return "first"
        if frame.fits(within_first=False) and hidden >= min(ci, co * taps):
            return "second"
        return None

    def choose(self, weight: Tensor, hidden: int, frame: Frame, *, allow_inexact: bool) -> Choice:
        """The role by the sizes or, where they do not decide, by the weight's rank, whose factors the choice then carries."""
        choice = self.choose_if_exact(weight, hidden, frame)
        if choice is not None:
            return choice
        sides = self._sides(frame)
        if not sides:
            raise MorphError(
                f"Direct puts the whole weight into one kernel, and a weight of size {frame.kernel} fits into neither "
                f"{frame.first} nor {frame.second}; enlarge one of the kernel sizes or use General."
            )
        if not allow_inexact:
            refuse_below_rank(weight, hidden, frame)
        factored = {side: _factorise(weight, side, hidden) for side in sides}
        role = min(sides, key=lambda side: float(factored[side][1].sum()))
        return Choice(self, f"asked for; the nearest weight of rank {hidden}", role, factored[role][0])

    def choose_if_exact(self, weight: Tensor, hidden: int, frame: Frame) -> Choice | None:
        """The choice where the closed form is exact, by the sizes or by low rank; each item's rank must then be low enough."""
        co, ci = weight.shape[1:3]
        role = self.role(frame, co, ci, hidden)
        if role is not None:
            name, bound, channels = ("K1", "C_out", co) if role == "first" else ("K2", "C_in", ci)
            fits = f"closed form: {name} >= K and " if frame.kernel else "closed form: "
            if hidden >= channels:
                return Choice(self, f"{fits}C_hid >= {bound}", role)
            return Choice(self, f"{fits}C_hid >= the weight's rank", role, _factorise(weight, role, hidden)[0])
        exact = 0.5 * tolerance(weight.dtype)
        for side in self._sides(frame) if len(weight) else ():
            if may_have_rank(_matrix(weight, side), hidden, exact):
                factors, missed = _factorise(weight, side, hidden)
                if bool((missed <= exact).all()):
                    return Choice(self, "closed form by the weight's low rank", side, factors)
        return None

    def chooses_by_sizes(self, co: int, ci: int, hidden: int, frame: Frame) -> bool:
        """Where there are as many hidden channels as the weight has on the side that the closed form keeps."""
        role = self.role(frame, co, ci, hidden)
        return role is not None and hidden >= (co if role == "first" else ci)

    @staticmethod
    def _sides(frame: Frame) -> list[Side]:
        sides: tuple[Side, ...] = ("first", "second")
        return [side for side in sides if frame.fits(within_first=side == "first")]

    def solve(self, equation: Equation) -> Solution:
        """Build a batch of answers."""
        if equation.factors is None:
            weight = equation.weight.to(equation.work) if equation.corrected else equation.weight
            sizes = (equation.hidden, equation.frame, equation.noise.seeds)
            kernels = equation.backend.direct(weight, *sizes, density=self.density, into_first=equation.role == "first")
            if kernels is not None:
                return Solution.without_steps(*kernels)
        return self._into_first(equation) if equation.role == "first" else self._into_first(equation.transposed).transposed

    def cost(self, co: int, ci: int, hidden: int, frame: Frame, half_steps: int) -> float:
        """Mixing of both kernels."""
        block = max(_SMALLEST_BLOCK, math.isqrt(hidden) + 1)
        return 2.0 * block * hidden * (ci * tap_count(frame.first) + co * tap_count(frame.second))

    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """The same closed form with a dense P, by the numpy oracle, which finds the role for itself."""
        turned, (co, ci) = weight.swapaxes(0, 1), weight.shape[:2]
        matrices: dict[Side, reference.Array] = {
            "first": weight.reshape(len(weight), -1),
            "second": turned.reshape(len(turned), -1),
        }
        limit = 0.5 * tol * np.linalg.norm(weight)
        sides = sorted(self._sides(frame), key=lambda side: np.linalg.matrix_rank(matrices[side], limit))
        role = self.role(frame, co, ci, hidden) or sides[0]
        if role == "first":
            return reference.direct(weight, hidden, frame, draw, self.density)
        solved = reference.direct(turned, hidden, frame.transposed, draw, self.density)
        return reference.Solved(solved.second.swapaxes(0, 1), solved.first.swapaxes(0, 1), solved.trace)

    def _into_first(self, equation: Equation) -> Solution:
        """F1 = P [S; S; V], F2 = [R | -R | U] P^T for G = U V, a range of channels at a time."""
        (batch, co, ci), hidden, frame = equation.sizes, equation.hidden, equation.frame
        # G = U V: (B, Co, r), None for a unit matrix, and (B, r, Ci, *K).
        left, right = (None, equation.weight) if equation.factors is None else (f.to(equation.work) for f in equation.factors)
        rank = right.shape[1]
        pairs, extras = (hidden - rank) // 2, hidden - rank  # an odd extra channel meets zeros in F2
        centre = tuple((k - 1) // 2 for k in frame.second)
        within = window(tuple(b - c for b, c in zip(frame.before, centre, strict=True)), frame.kernel)
        everything: Any = slice(None)
        one, two, odd = slice(pairs), slice(pairs, 2 * pairs), slice(2 * pairs, extras)

        power = frobenius(right, equation.work).square() / (right[0].numel() if batch else 1)  # of an entry of V, (B,)
        power = torch.where(power > 0, power, torch.full_like(power, 1.0 / (ci * tap_count(frame.first))))
        spread = _column(power.sqrt(), right.ndim)
        density = self.density * math.sqrt(rank / (2 * max(1, pairs) * co))  # makes F2's taps as `density` says
        # P keeps norms: scaled by this, the kernels come out with one root mean square, as far as noise has its expectation.
        power1 = power * (extras * tap_count(frame.first) + rank * tap_count(frame.kernel)) / tap_count(frame.first)
        power2 = (rank + 2 * pairs * co * tap_count(frame.second) * density**2) / (co * tap_count(frame.second))
        balance = (power2 / power1) ** 0.25

        s, r = equation.noise.parts(extras - pairs, ci, *frame.first), equation.noise.parts(pairs, co, *frame.second)

        def rows(part: slice) -> Tensor:
            """[S; S; s; V] for some input channels."""
            noise, channels = s(part) * spread, part.stop - part.start
            out = noise.new_empty(batch, hidden, channels, *frame.first)
            out[:, one] = out[:, two] = noise[:, :pairs]
            out[:, odd] = noise[:, pairs:]
            if frame.first != frame.kernel:
                out[:, extras:] = 0
            out[(everything, slice(extras, None), everything, *within)] = right[:, :, part]
            return out

        def columns(part: slice) -> Tensor:
            """[R | -R | 0 | U]^T for some output channels."""
            noise, channels = r(part) * density, part.stop - part.start
            out = noise.new_empty(batch, hidden, channels, *frame.second)
            out[:, one], out[:, two] = noise, -noise
            out[:, 2 * pairs :] = 0
            tap = out[(everything, slice(extras, None), everything, *centre)]  # (B, r, channels)
            if left is None:
                tap[:, part].diagonal(dim1=1, dim2=2).fill_(1)
            else:
                tap.copy_(left[:, part].mT)
            return out

        mix = _Mixing(hidden, 2 * pairs, power)
        dtype = equation.work if equation.corrected else equation.dtype
        first = _mixed(rows, mix, balance, (batch, hidden, ci, *frame.first), dtype)
        second = _mixed(columns, mix, 1 / balance, (batch, hidden, co, *frame.second), dtype)
        return Solution.without_steps(first, second.transpose(1, 2))


def _matrix(weight: Tensor, side: Side) -> Tensor:
    """The weight as the matrix whose rank counts where `side` holds it: (B, Co, Ci*|K|) or (B, Ci, Co*|K|), float64."""
    rows = weight if side == "first" else weight.transpose(1, 2)
    return rows.flatten(2).to(torch.float32 if weight.device.type == "mps" else torch.float64)


def _factorise(weight: Tensor, side: Side, hidden: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """U and V of `Choice`, of rank C_hid at most, and the relative Frobenius norm (B,) that rank C_hid leaves."""
    u, s, vh = torch.linalg.svd(_matrix(weight, side), full_matrices=False)
    fine = 0.5 * tolerance(weight.dtype) * (1.0 if weight.dtype == torch.float64 else 0.1)
    rank = max(1, min(hidden, int(numerical_rank(s, fine).max()) if len(s) else 0))
    shape = weight.shape[2:] if side == "first" else (weight.shape[1], *weight.shape[3:])
    norms = tail_norms(s)  # (B, n + 1)
    missed = norms[:, min(hidden, s.shape[1])] / norms[:, 0].clamp_min(torch.finfo(norms.dtype).tiny)
    return (u[:, :, :rank], (s[:, :rank, None] * vh[:, :rank]).view(-1, rank, *shape)), missed


def _mixed(
    unmixed: Callable[[slice], Tensor], mix: _Mixing, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """P times all of `unmixed`, (B, Ch, C, *K) rounded to `dtype`, in ranges of C whose working memory stays small."""
    most = _NUMBERS_CPU if scale.device.type == "cpu" else _NUMBERS
    width = max(1, most // max(1, shape[0] * shape[1] * math.prod(shape[3:])))
    if width >= shape[2] and dtype == scale.dtype:
        return mix(unmixed(slice(0, shape[2])), scale)
    out = scale.new_empty(shape, dtype=dtype)
    for start in range(0, shape[2], width):
        part = slice(start, min(start + width, shape[2]))
        out[:, :, part] = mix(unmixed(part), scale)
    return out


class _Mixing:
    """An orthogonal P over the hidden channels, the first `noisy` of which are noise in both kernels.

    It is block-diagonal: each block mixes the channels of one remainder modulo the number of blocks, all by one matrix. Where
    noise is too rare for each block to get some, a block over the first channels spreads it first, one to each block at least.
    """

    def __init__(self, hidden: int, noisy: int, like: Tensor) -> None:
        smallest = min(hidden, _SMALLEST_BLOCK)
        self.noise_first = hidden > smallest and noisy * smallest < hidden
        if self.noise_first:
            smallest = max(smallest, math.isqrt(hidden - 1) + 1)  # as wide as there are blocks, or wider
        self.block = next((n for n in range(smallest, 2 * smallest) if hidden % n == 0), smallest)
        self.blocks = hidden // self.block
        self.whole = self.blocks * self.block  # what is left over is mixed by one more block, over the last channels
        self.q = _orthogonal(self.block).to(like)

    def __call__(self, x: Tensor, scale: Tensor) -> Tensor:
        """P x, times the scale (B,) of each item: (B, Ch, *any) -> (B, Ch, *any).

        Fresh memory costs more than the arithmetic: that of `x`, which is spent, and one buffer take turns.
        """
        rows = x.flatten(2)
        batch, _, columns = rows.shape
        if self.noise_first:
            rows[:, : self.block] = torch.matmul(self.q, rows[:, : self.block])
        mixed = torch.empty_like(rows)
        across = (batch, self.block, self.blocks * columns)
        body, into = rows[:, : self.whole].view(across), mixed[:, : self.whole].view(across)
        torch.bmm(self.q * scale.view(-1, 1, 1), body, out=into)
        if self.whole < rows.shape[1]:
            mixed[:, self.whole :] = rows[:, self.whole :] * scale.view(-1, 1, 1)
            mixed[:, -self.block :] = torch.matmul(self.q, mixed[:, -self.block :])
        return mixed.view(x.shape)


@lru_cache(maxsize=64)
def _orthogonal(size: int) -> Tensor:
    """One orthogonal matrix without zeros for each size: P may be any, for S and R are random already."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64, device="cpu")
    return torch.linalg.qr(noise)[0]


def _column(values: Tensor, ndim: int) -> Tensor:
    return values.view(-1, *(1,) * (ndim - 1))
