"""The weights of a stream at another width (see `fastmorph.graph.streams.algebra` for what they must be).

With d old channels, D new ones and s = sqrt(D / d):

- axis fill: entries of writers are times s, and their new rows are zero, or the mean of the old ones as they reach the stream.
  Columns that read new channels are noise, gains of norms are divided by s.
- turned: with H of D rows orthogonal, a writer W becomes s H [W; 0] and a reader [W diag(gain) / s | noise] H^T; the gains of
  norms become ones, and their bias s H [bias / gain; 0]. Where a bias is larger than its gain, which may be zero, the quotient
  would drown what stands beside it: the new bias holds the constant s in one new channel instead, s H [bias / gain or 0; 1; 0],
  and readers have W times these biases in its column, in the place of noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmorph.elsewhere import values_of
from fastmorph.equation.randomness import Stream as Noise
from fastmorph.errors import MorphError
from fastmorph.graph.growth import Growth
from fastmorph.graph.record import Axis
from fastmorph.graph.streams.algebra import Change, WiderOutput
from fastmorph.morphs.turn import Turn
from fastmorph.morphs.widen_fill import root_mean_square
from fastmorph.morphs.widen_write import Side, write
from fastmorph.outputs import Outputs, Path
from fastmorph.plan.lineage import Map


@dataclass(frozen=True)
class OldChannels:
    """Outputs as wide as a stream that grew are compared on its old channels: a `Reading` of certificates.

    Attributes:
        wider: these outputs, by path.
        sizes: d and D.
        turn: how the stream is turned; None: old channels come first.
        gains: of norms that readers have taken over, by name.
        constants: biases that readers have taken over, by their gains: the new channel that is constant, and their values.
    """

    wider: Mapping[Path, WiderOutput]
    sizes: tuple[int, int]
    turn: Turn | None
    gains: Mapping[str, Tensor]
    constants: Mapping[tuple[str, ...], Sequence[tuple[int, Tensor]]]

    @property
    def told(self) -> str:
        """What a certificate says of it."""
        names = ", ".join(dict.fromkeys(".".join(map(str, path)) or "output" for path in self.wider))
        factors = " or ".join(f"{factor:.6g}" for factor in sorted({output.factor for output in self.wider.values()}))
        turned = ", turned back" if self.turn else ""
        return (
            f"the {self.sizes[0]} old ones of {self.sizes[1]} channels of {names}, which have changed (times {factors}{turned})"
        )

    def outputs(self, parent: Outputs, child: Outputs) -> Outputs:
        """With old channels alone, and as they were."""
        return {path: self._old(self.wider.get(path), leaf) for path, leaf in child.items()}

    def _old(self, output: WiderOutput | None, leaf: Any) -> Any:
        if output is None or not isinstance(leaf, Tensor) or leaf.ndim <= output.dim:
            return leaf
        wide = leaf if leaf.dtype in (torch.float32, torch.float64) else leaf.float()
        wide, dim = wide.unflatten(output.dim, (-1, self.sizes[1])), output.dim + 1
        if self.turn is not None:
            wide = self.turn.apply(wide.clone(memory_format=torch.contiguous_format), dim, back=True)
        old = wide.narrow(dim, 0, self.sizes[0]) / output.factor
        for name in output.absorbs:
            old = old * _along(dim, self.gains[name].to(old), old)
        for channel, biases in self.constants.get(output.absorbs, ()):
            old = old + wide.narrow(dim, channel, 1) / output.factor * _along(dim, biases.to(old), old)
        return old.flatten(output.dim, dim).to(leaf.dtype)

    def layer(self, name: str) -> str | None:
        """No layer is new."""
        return name


class StreamFilling:
    """The weights that make a growth of a stream exact.

    Args:
        layer: the name of the layer that is widened, for errors.
        growth: with what was found of it (`Growth.stream`).
        noise: what noise is drawn from.
        vectors: the old values of the gains and biases that others take over, by name: `gains` says which.
    """

    def __init__(self, layer: str, growth: Growth, noise: Noise, vectors: Mapping[str, Tensor]) -> None:
        assert growth.stream is not None
        # What tensors are filled by, without the run that it was found in.
        self._layer, self._layouts, self._stream, self._noise = layer, growth.layouts, growth.stream, noise
        record = growth.coupling.record
        self._grown = {name: [axis for axis in record.parameter(name) if axis in growth.layouts] for name in growth.names}
        self._vectors = {name: values_of(vector) + self._stream.changes[name].offset for name, vector in vectors.items()}
        self._sizes = min((axis.size, len(layout.origin)) for axis, layout in growth.layouts.items())
        self._reads = record.mask("reads")
        centred = self._stream.centred
        self._turn = Turn(self._sizes, noise.of("turn"), centred=centred) if self._stream.kind == "turned" else None
        self._constants: dict[tuple[str, ...], list[tuple[int, Tensor]]] = {}
        self._shifts: dict[str, tuple[Tensor, int]] = {}  # of a norm's bias: its quotients, and its constant channel or 0
        if self._turn is not None:
            for name, change in self._stream.changes.items():
                if change.shifts:
                    self._shifts[name] = self._shift(name, change.shifts)

    def _shift(self, name: str, gains: tuple[str, ...]) -> tuple[Tensor, int]:
        """What a norm's bias is over its gains, (d,), zeros where that is large, and the channel that stands for these."""
        gain, bias = self._product(gains), self._vectors[name].double()
        large, channel = bias.abs() > gain.abs(), 0
        if large.any():
            held = self._constants.setdefault(gains, [])
            channel = self._sizes[0] + len(held)
            if channel == self._sizes[1]:
                raise MorphError(
                    f"layer {self._layer!r}: no new channel is left to hold the bias {name!r}, which is larger than the gains "
                    f"{gains[0]!r} of its norm; use fill='zero', or a larger width."
                )
            held.append((channel, bias * large))
        return torch.where(large | (gain == 0), 0.0, bias / gain), channel

    def _product(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self._vectors[name].double() for name in names]).prod(0)

    @staticmethod
    def gains(growth: Growth) -> set[str]:
        """The vectors that others take over, or are made by."""
        changes = () if growth.stream is None else growth.stream.changes.values()
        outputs = () if growth.stream is None else growth.stream.outputs.values()
        biases = {name for name, change in (() if growth.stream is None else growth.stream.changes.items()) if change.shifts}
        return {name for change in changes for name in (*change.behind, *change.absorbs, *change.shifts)} | {
            *biases,
            *(name for output in outputs for name in output.absorbs),
        }

    def reading(self) -> OldChannels:
        """How outputs as wide as the stream are read."""
        return OldChannels(self._stream.outputs, self._sizes, self._turn, self._vectors, self._constants)

    def tensor(self, name: str, old: Tensor) -> Tensor:
        """The new values of a parameter or buffer."""
        return self._widened(name, values_of(old)) if self._turn is None else self._turned(name, values_of(old))

    def moments(self, name: str) -> tuple[Map | None, Map | None]:
        """The maps that take its first and squared moments to the new shape; None: they start afresh."""
        if self._turn is None:
            return lambda moment: self._moment(name, moment, 1), lambda moment: self._moment(name, moment, 2)
        if not self._can_follow(name):
            return None, None
        return lambda moment: self._turned_moment(name, moment), lambda moment: self._turned_square(name, moment)

    def _axes(self, name: str) -> list[Axis]:
        return self._grown[name]

    def _is_read(self, axis: Axis) -> bool:
        """Whether new entries along an axis are free columns: what writes the stream as well (a tie) decides for both."""
        alone = len(self._axes(axis.name)) == 1 and self._stream.changes[axis.name].made is not None
        return bool(self._reads[axis.start : axis.start + axis.size].any()) and not alone

    # --- axis fill ------------------------------------------------------------------------------------------------------------

    def _widened(self, name: str, old: Tensor) -> Tensor:
        change, axes = self._stream.changes[name], self._axes(name)
        noisy = any(map(self._is_read, axes))
        new = write(old, self._sides(name, drawn=True), root_mean_square(old) if noisy else 0.0)
        for axis in axes:
            parts, dim = self._parts(new, axis), axis.dim + 1
            fresh = parts.narrow(dim, self._sizes[0], self._sizes[1] - self._sizes[0])
            if self._is_read(axis):
                if change.read == "mean":
                    fresh -= fresh.mean(dim, keepdim=True)
            elif change.gain:
                fresh.fill_(_typical(old + change.offset) - change.offset)
            elif change.made == "mean":
                fresh.copy_(self._mean(change, parts.narrow(dim, 0, self._sizes[0]), dim))
        if change.factor != 1:
            new.add_(change.offset).mul_(change.factor).sub_(change.offset) if change.offset else new.mul_(change.factor)
        return new

    def _parts(self, new: Tensor, axis: Axis) -> Tensor:
        """A view of a new tensor in which an axis is two: how often it holds the stream, and its D channels."""
        return new.unflatten(axis.dim, (-1, self._sizes[1]))

    def _mean(self, change: Change, rows: Tensor, dim: int) -> Tensor:
        """The mean of rows as they reach the stream, over what new gains multiply by."""
        if not change.behind:
            return rows.mean(dim, keepdim=True, dtype=torch.float64)
        gain = self._product(change.behind)
        new = math.prod(_typical(self._vectors[name]) for name in change.behind)
        return (rows * _along(dim, gain, rows)).mean(dim, keepdim=True) / new

    def _sides(self, name: str, *, drawn: bool, value: float = 0.0) -> list[Side]:
        sides = []
        for axis in self._axes(name):
            layout, reads = self._layouts[axis], self._is_read(axis)
            to, fresh = (layout.copy == 0).nonzero()[0], layout.copy.nonzero()[0]
            noise, is_noisy = self._noise.of(name, axis.dim), drawn and reads
            chosen = {"drawn": fresh} if is_noisy else {"rest": fresh, "value": value}
            sides.append(Side(axis.dim, reads, to, layout.origin[to], fresh, noise, **chosen))
        return sorted(sides, key=lambda side: not side.reads)

    def _moment(self, name: str, moment: Tensor, power: int) -> Tensor:
        """Gradients are divided by what weights are times; a squared moment of zero would make the first steps too long."""
        value = float(moment.float().mean()) if power == 2 else 0.0
        return write(moment, self._sides(name, drawn=False, value=value), 0.0).div_(self._stream.changes[name].factor ** power)

    # --- turned ---------------------------------------------------------------------------------------------------------------

    def _turned(self, name: str, old: Tensor) -> Tensor:
        change = self._stream.changes[name]
        if change.gain:
            sizes = {axis.dim: len(self._layouts[axis].origin) for axis in self._axes(name)}
            return old.new_full([sizes.get(dim, size) for dim, size in enumerate(old.shape)], 1 - change.offset)
        new = self._spread(name, old, root_mean_square(old))
        return new.mul_(change.factor) if change.factor != 1 else new

    def _taken_over(self, axis: Axis) -> Tensor | None:
        """What old entries along an axis are multiplied by, (size,): gains that are ones from now on."""
        change = self._stream.changes[axis.name]
        names = change.absorbs if self._is_read(axis) else change.behind
        return self._product(names) if names else None

    def _divisors(self, axis: Axis) -> Tensor | None:
        """One over what gradients along an axis are divided by, (size,): zeros where they do not follow."""
        factors = self._taken_over(axis)
        if factors is None:
            return None
        held = self._constants.get(self._stream.changes[axis.name].absorbs, ()) if self._is_read(axis) else ()
        lost = torch.stack([factors == 0, *(biases != 0 for _, biases in held)]).any(0)
        return torch.where(lost, 0.0, 1 / factors)

    def _spread(self, name: str, old: Tensor, scale: float) -> Tensor:
        """Old entries times what is taken over, noise behind columns, zeros behind rows; all turned."""
        assert self._turn is not None
        wide = old.dtype if old.dtype in (torch.float32, torch.float64) else torch.float32
        moment, change = not scale, self._stream.changes[name]
        if name in self._shifts and not moment:
            old = self._shifts[name][0].to(wide)
        new = write(old.to(wide), self._sides(name, drawn=scale > 0), scale)
        for axis in self._axes(name):
            factors = self._divisors(axis) if moment else self._taken_over(axis)
            parts, dim = self._parts(new, axis), axis.dim + 1
            held = parts.narrow(dim, 0, self._sizes[0])
            for channel, biases in self._constants.get(change.absorbs, ()) if self._is_read(axis) and not moment else ():
                parts.select(dim, channel).copy_(torch.tensordot(held, biases.to(wide), dims=([dim], [0])))
            if self._shifts.get(name, (None, 0))[1] and not moment:
                parts.select(dim, self._shifts[name][1]).fill_(1.0)
            if factors is not None:
                held.mul_(_along(dim, factors.to(wide), parts))
        for axis in self._axes(name):
            self._turn.apply(self._parts(new, axis), axis.dim + 1)
        return new.to(old)

    def _can_follow(self, name: str) -> bool:
        """Whether gradients follow a turn: not those of gains and biases, which are others'."""
        change = self._stream.changes[name]
        return not (change.gain or change.shifts)

    def _turned_moment(self, name: str, moment: Tensor) -> Tensor:
        return self._spread(name, moment, 0.0).div_(self._stream.changes[name].factor)

    def _turned_square(self, name: str, moment: Tensor) -> Tensor:
        """A dense map spreads squares evenly."""
        new = moment
        for axis in self._axes(name):
            factors, parts, dim = self._divisors(axis), new.unflatten(axis.dim, (-1, self._sizes[0])), axis.dim + 1
            if factors is not None:
                parts = parts * _along(dim, factors.to(moment).square(), parts)
            mean = parts.sum(dim, keepdim=True) / self._sizes[1]
            new = mean.expand([self._sizes[1] if at == dim else size for at, size in enumerate(parts.shape)]).flatten(
                dim - 1, dim
            )
        return new / self._stream.changes[name].factor ** 2


def _along(dim: int, values: Tensor, like: Tensor) -> Tensor:
    return values.view([-1 if other == dim else 1 for other in range(like.ndim)])


def _typical(gain: Tensor) -> float:
    """A gain like the others: their root mean square, which is not zero."""
    return float(gain.double().square().mean().sqrt()) or 1.0
