"""A closed form: where the whole weight fits into one of the two kernels, no equation need be solved.

With e = C_hid - r extra channels, m = e // 2 of them in pairs,

    F1 = P [G; S; S],   F2 = [I | R | -R] P^T,

where S and R are noise, I is a delta kernel that puts G where the frame has it, and P is orthogonal over the hidden channels.
F2 * F1 = I * G + R * S - R * S = G whatever S, R and P are. P mixes the three groups, so that no entry stays zero and no
channel stays a copy of another. It is two block-orthogonal stages with a permutation between them (a Monarch matrix): the
blocks are about sqrt(C_hid) wide, so that mixing costs C_hid^1.5 a column where a dense P would cost C_hid^2.

r = C_out and [I; G] in general; where C_hid is smaller than that, G = U V by a singular value decomposition, with r its rank.
The other role, the weight in F2, is the same on the transposed equation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastmorph import reference
from fastmorph.bounds import numerical_rank
from fastmorph.errors import MorphError
from fastmorph.frame import Frame, volume, window
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
        """Two mixing stages over both kernels."""
        block = max(_SMALLEST_BLOCK, math.isqrt(hidden) + 1)
        return 4.0 * block * hidden * (ci * volume(frame.first) + co * volume(frame.second))

    def memory(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """Each kernel before and after a stage."""
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
        """F1 = P [V; S; S], F2 = [U | R | -R] P^T for G = U V."""
        (batch, co, ci), hidden, frame = equation.sizes, equation.hidden, equation.frame
        left, right = _factors(equation)  # (B, Co, r), (B, r, Ci, *K)
        rank = right.shape[1]
        pairs, single = divmod(hidden - rank, 2)
        centre = tuple((k - 1) // 2 for k in frame.second)
        offset = tuple(b - c for b, c in zip(frame.before, centre, strict=True))

        # The extra channels come first, so that they lie in whole blocks of P, which spread them over all channels.
        one, two, odd, held = (
            slice(pairs),
            slice(pairs, 2 * pairs),
            slice(2 * pairs, hidden - rank),
            slice(hidden - rank, hidden),
        )
        everything = slice(None)

        rows = right.new_zeros(batch, hidden, ci, *frame.first)  # [S; S; s; V]
        rows[(everything, held, everything, *window(offset, frame.kernel))] = right
        spread = right.flatten(1).square().mean(1).sqrt()
        spread = torch.where(spread > 0, spread, torch.full_like(spread, (ci * volume(frame.first)) ** -0.5))
        noise = equation.noise(pairs + single, ci, *frame.first).to(right) * _column(spread, rows.ndim)
        rows[:, one] = rows[:, two] = noise[:, :pairs]
        rows[:, odd] = noise[:, pairs:]  # the odd one meets zeros in F2

        columns = right.new_zeros(batch, hidden, co, *frame.second)  # [R | -R | 0 | U]^T
        tap = window(centre, (1,) * len(centre))
        columns[(everything, held, everything, *tap)] = left.mT.reshape(batch, rank, co, *(1,) * len(centre))
        scale = self.density * math.sqrt(rank / (2 * max(1, pairs) * co))  # makes P's taps as `density` says
        noise = equation.noise(pairs, co, *frame.second).to(right) * scale
        columns[:, one], columns[:, two] = noise, -noise

        mix = _Monarch(equation)
        first, second = mix(rows), mix(columns).transpose(1, 2)
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


class _Monarch:
    """A random orthogonal P over the hidden channels, (B, Ch, *any) -> (B, Ch, *any)."""

    def __init__(self, equation: Equation) -> None:
        hidden = equation.hidden
        self.block = min(hidden, max(_SMALLEST_BLOCK, math.isqrt(hidden - 1) + 1))
        self.blocks = hidden // self.block
        self.whole = self.blocks * self.block  # what is left over is mixed by one more block, over the last channels
        extra = int(self.whole < hidden)
        shape = (2, self.blocks + extra, self.block, self.block)
        self.stages = torch.linalg.qr(equation.noise(*shape).to(equation.weight))[0]  # (B, 2, blocks, block, block)
        order = torch.arange(hidden, device=equation.weight.device)
        order[: self.whole] = order[: self.whole].view(self.blocks, self.block).T.flatten()
        self.order = order

    def __call__(self, x: Tensor) -> Tensor:
        """P x. Fresh memory costs more than the arithmetic: that of `x`, which is spent, and one buffer take turns."""
        rows = x.flatten(2).contiguous()
        mixed = self._stage(rows, torch.empty_like(rows), 0)
        if self.blocks > 1:  # a single block mixes all there is to mix at once
            torch.index_select(mixed, 1, self.order, out=rows)
            mixed = self._stage(rows, mixed, 1)
        return mixed.view(x.shape)

    def _stage(self, rows: Tensor, out: Tensor, stage: int) -> Tensor:
        q = self.stages[:, stage]
        batch, hidden, columns = rows.shape
        if self.whole == hidden:
            blocks = (batch * self.blocks, self.block, columns)
            torch.bmm(q.reshape(-1, self.block, self.block), rows.view(blocks), out=out.view(blocks))
            return out
        body = rows[:, : self.whole].unflatten(1, (self.blocks, self.block))
        out[:, : self.whole] = torch.matmul(q[:, : self.blocks], body).flatten(1, 2)
        out[:, self.whole :] = rows[:, self.whole :]
        out[:, -self.block :] = torch.bmm(q[:, -1], out[:, -self.block :])
        return out


def _column(values: Tensor, ndim: int) -> Tensor:
    return values.view(-1, *(1,) * (ndim - 1))
