"""Kernels in a row, peeled off a weight one at a time, and weights shared out among several rows.

G = rest * F1, then rest = rest' * F2, and so on: each is an equation of two kernels. The sizes alone decide them all, so that
they are known before the first is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmorph.equation.backends.torch_backend import pad
from fastmorph.equation.frame import Frame, Size, make_frame, size_per_dimension, window
from fastmorph.equation.problem import Problem, check_hidden
from fastmorph.errors import MorphError


@dataclass(frozen=True)
class Peeling:
    """Sizes of the kernels in a row that stand for a weight, or for the share of it that they reach.

    Attributes:
        sizes: of the kernels, from the input to the output.
        hidden: channels between them, one fewer than kernels.
        frames: of the equations, one fewer than kernels.
        reach: size of the composed kernel, sum(Ki - 1) + 1.
        share: size of the share, the weight's own or, where the row reaches less far, as far as it reaches.
        offset: where the share, the middle of the weight, starts there.
        before: where the weight's first tap stands in the composed kernel; negative where that reaches less far.
    """

    sizes: tuple[Size, ...]
    hidden: tuple[int, ...]
    frames: tuple[Frame, ...]
    reach: Size
    share: Size
    offset: Size
    before: Size

    @property
    def share_before(self) -> Size:
        """Where the share's first tap stands in the composed kernel."""
        return tuple(b + o for b, o in zip(self.before, self.offset, strict=True))

    def problem(self, index: int, rest: Tensor) -> Problem[Tensor]:
        """The equation of kernel `index`, for what the kernels before it have left of the share."""
        frame = self.frames[index]
        return Problem(rest, self.hidden[index], (frame.first, frame.second), len(self.reach))

    def single(self, share: Tensor) -> Tensor:
        """The only kernel of a row of one: the share, (B, Co, Ci, *share), with zeros around it."""
        return pad(share, self.share_before, self.reach)


def plan_peeling(
    kernel: Size, co: int, ci: int, hidden_channels: Sequence[int], kernel_sizes: Sequence[int | Sequence[int]]
) -> Peeling:
    """Size a row of kernels for a weight of co x ci channels. Raises MorphError for unusable sizes and channels."""
    if len(kernel_sizes) != len(hidden_channels) + 1:
        raise MorphError(
            f"{len(kernel_sizes)} kernels in a row have {len(kernel_sizes) - 1} numbers of hidden channels between them; got "
            f"{len(hidden_channels)}."
        )
    sizes = tuple(size_per_dimension(size, len(kernel)) if kernel else () for size in kernel_sizes)
    hidden = tuple(map(check_hidden, hidden_channels))
    reach = _reach(sizes)
    share = rest = tuple(map(min, reach, kernel))
    offset = tuple((k - n) // 2 for k, n in zip(kernel, share, strict=True))
    frames: list[Frame] = []
    for index, channels in enumerate(hidden):
        after = sizes[index + 1 :]
        second = after[0] if len(after) == 1 else _left_over(rest, co, ci, channels, sizes[index], _reach(after))
        frames.append(make_frame(rest, (sizes[index], second)))
        rest, ci = second, channels
    placed = [frame.before for frame in frames or [Frame(share, reach, (1,) * len(reach))]]
    before = tuple(sum(widths) - start for start, *widths in zip(offset, *placed, strict=True))
    return Peeling(sizes, hidden, tuple(frames), reach, share, offset, before)


def share_out(
    weight: Tensor, rows: Mapping[int, Peeling], whole: int, noise: Callable[[Size], Tensor], dtype: torch.dtype
) -> dict[int, Tensor]:
    """Each row's share of a weight (*B, Co, Ci, *K), (*B, Co, Ci, *share) rounded to `dtype`; `whole` has what is left.

    `noise(shape)` draws normal noise, which makes the shares differ; it may be of any dtype and on any device.
    """
    rest, dims = weight.clone(), len(rows[whole].reach)
    spread = rest.flatten(-dims - 2).square().mean(-1).sqrt() / len(rows)
    spread = spread.view(*spread.shape, *(1,) * (dims + 2))
    shares: dict[int, Tensor] = {}
    for index, row in rows.items():
        if index != whole:
            cut = (..., *window(row.offset, row.share))
            shares[index] = (rest[cut] / len(rows) + noise(tuple(rest[cut].shape)).to(rest) * spread).to(dtype)
            rest[cut] -= shares[index]
    return {**shares, whole: rest.to(dtype)}


def find_whole(rows: Mapping[int, Peeling], kernel: Size) -> int:
    """The first row that reaches over a whole kernel of that size. Raises MorphError where none does."""
    for index, row in rows.items():
        if row.share == kernel:
            return index
    raise MorphError(f"no branch reaches over the whole kernel of size {kernel}; enlarge the kernels of one of them.")


def _reach(sizes: Sequence[Size]) -> Size:
    return tuple(sum(k - 1 for k in along) + 1 for along in zip(*sizes, strict=True))


def _left_over(rest: Size, co: int, ci: int, hidden: int, first: Size, reach: Size) -> Size:
    """Size of what is left for the next kernels after one of size `first`: the smallest, which makes their equations easy.

    With few hidden channels the closed form needs room for the whole weight there: then it is as large as that.
    """
    smallest = tuple(max(1, k - n + 1) for k, n in zip(rest, first, strict=True))
    fits = all(n >= k for n, k in zip(reach, rest, strict=True))
    in_first = all(n == 1 for n in smallest) and hidden >= co
    return rest if fits and not in_first and hidden >= ci else smallest
