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
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fastmorph import reference
from fastmorph.bounds import numerical_rank
from fastmorph.errors import MorphError
from fastmorph.frame import Frame, volume, window
from fastmorph.half_step import batch_norm
from fastmorph.solvers.base import Equation, Solution, Solver

_SMALLEST_BLOCK = 8  # below this a block is dense anyway and a product of its size costs only its launch


@dataclass(frozen=True)
class Direct(Solver):
    """Closed form, exact to rounding where K1 >= K and C_hid >= C_out, or K2 >= K and C_hid >= C_in; else by low rank.

    Time grows with the number of weights. The condition is perfect: no system is solved.

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
    def role(frame: Frame, co: int, ci: int, hidden: int) -> bool | None:
        """True: the weight goes into F1; False: into F2; None: exact in neither, except for weights of low rank."""
        taps = volume(frame.kernel)
        if frame.fits(within_first=True) and hidden >= min(co, ci * taps):
            return True
        if frame.fits(within_first=False) and hidden >= min(ci, co * taps):
            return False
        return None

    @staticmethod
    def needs_rank(frame: Frame, co: int, ci: int, hidden: int) -> bool:
        """Whether the weight must be factored by its rank, because neither a unit matrix of C_out nor of C_in fits."""
        role = Direct.role(frame, co, ci, hidden)
        return role is None or hidden < (co if role else ci)

    def solve(self, equation: Equation) -> Solution:
        """Build a batch of answers."""
        role = self.role(equation.frame, *equation.sizes[1:], equation.hidden)
        if role is None:
            role = self._low_rank_role(equation.weight, equation.hidden, equation.frame, equation.tolerance)
        return self._into_first(equation) if role else self._into_first(equation.transposed).transposed

    def cost(self, co: int, ci: int, hidden: int, frame: Frame, half_steps: int) -> float:
        """Mixing of both kernels."""
        block = max(_SMALLEST_BLOCK, math.isqrt(hidden) + 1)
        return 2.0 * block * hidden * (ci * volume(frame.first) + co * volume(frame.second))

    def memory(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """Each kernel before and after mixing."""
        return 3 * hidden * (ci * volume(frame.first) + co * volume(frame.second)) + co * ci * volume(frame.size)

    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """The same closed form with a dense P, by the numpy oracle."""
        co, ci = weight.shape[:2]
        role = self.role(frame, co, ci, hidden)
        if role is None:
            role = self._low_rank_role(torch.from_numpy(weight)[None], hidden, frame, tol)
        if role:
            return reference.direct(weight, hidden, frame, draw, self.density)
        solved = reference.direct(weight.swapaxes(0, 1), hidden, frame.transposed, draw, self.density)
        return reference.Solved(solved.second.swapaxes(0, 1), solved.first.swapaxes(0, 1), solved.trace)

    @staticmethod
    def _low_rank_role(weight: Tensor, hidden: int, frame: Frame, tol: float) -> bool:
        """The role in which the weight has the lower rank."""
        ranks: dict[bool, int] = {}
        for role, matrix in ((True, weight.flatten(2)), (False, weight.transpose(1, 2).flatten(2))):
            if frame.fits(within_first=role):
                ranks[role] = int(numerical_rank(matrix, 0.5 * tol).max()) if len(weight) else 0
        if not ranks:
            raise MorphError(
                f"Direct puts the whole weight into one kernel, and a weight of size {frame.kernel} fits into neither "
                f"{frame.first} nor {frame.second}; enlarge one of the kernel sizes or use General."
            )
        return min(ranks, key=lambda role: ranks[role])

    def _into_first(self, equation: Equation) -> Solution:
        """F1 = P [S; S; V], F2 = [R | -R | U] P^T for G = U V."""
        (batch, co, ci), hidden, frame = equation.sizes, equation.hidden, equation.frame
        left, right = _factors(equation)  # (B, Co, r), (B, r, Ci, *K)
        rank = right.shape[1]
        pairs, single = divmod(hidden - rank, 2)
        centre = tuple((k - 1) // 2 for k in frame.second)
        offset = tuple(b - c for b, c in zip(frame.before, centre, strict=True))
        everything, one, two = slice(None), slice(pairs), slice(pairs, 2 * pairs)
        odd, held = slice(2 * pairs, hidden - rank), slice(hidden - rank, hidden)

        power = right.flatten(1).square().mean(1)  # of an entry of V, (B,)
        power = torch.where(power > 0, power, torch.full_like(power, 1.0 / (ci * volume(frame.first))))
        noise = equation.noise(pairs + single, ci, *frame.first) * _column(power.sqrt(), right.ndim)
        rows = right.new_empty(batch, hidden, ci, *frame.first)
        rows[:, one] = rows[:, two] = noise[:, :pairs]
        rows[:, odd] = noise[:, pairs:]  # the odd one meets zeros in F2
        if frame.first != frame.kernel:
            rows[:, held] = 0
        rows[(everything, held, everything, *window(offset, frame.kernel))] = right

        scale = self.density * math.sqrt(rank / (2 * max(1, pairs) * co))  # makes F2's taps as `density` says
        noise = equation.noise(pairs, co, *frame.second) * scale
        columns = right.new_empty(batch, hidden, co, *frame.second)  # F2's, transposed
        columns[:, one], columns[:, two] = noise, -noise
        columns[:, 2 * pairs :] = 0
        tap = window(centre, (1,) * len(centre))
        columns[(everything, held, everything, *tap)] = left.mT.reshape(batch, rank, co, *(1,) * len(centre))

        # P keeps norms: scaled here, the kernels come out with one root mean square.
        norm, entries = batch_norm(rows), ci * volume(frame.first) / (co * volume(frame.second))
        balance = torch.where(norm > 0, (batch_norm(columns) / norm * entries**0.5).sqrt(), torch.ones_like(norm))
        mix = _Mixing(hidden, 2 * pairs, right)
        first, second = mix(rows, balance), mix(columns, 1 / balance).transpose(1, 2)
        none = torch.zeros(batch, dtype=torch.int64, device=right.device)
        return Solution(first, second, right.new_empty(0, batch), none)


def _factors(equation: Equation) -> tuple[Tensor, Tensor]:
    """G = U V: (B, Co, r) and (B, r, Ci, *K), with U = I and V = G where C_hid allows."""
    weight, hidden = equation.weight, equation.hidden
    batch, co, _ = equation.sizes
    if hidden >= co:
        return torch.eye(co, dtype=weight.dtype, device=weight.device).expand(batch, co, co), weight
    u, s, vh = torch.linalg.svd(weight.flatten(2), full_matrices=False)
    ranks = numerical_rank(weight.flatten(2), 0.5 * equation.tolerance)
    rank = max(1, min(hidden, int(ranks.max()) if len(ranks) else 0))
    right = (s[:, :rank, None] * vh[:, :rank]).view(batch, rank, *weight.shape[2:])
    return u[:, :, :rank], right


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
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def _column(values: Tensor, ndim: int) -> Tensor:
    return values.view(-1, *(1,) * (ndim - 1))
