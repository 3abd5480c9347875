"""A stream of channels that norms read, at any width: how each of its tensors must change, found by reading two runs.

The model has run as it is, with d channels, and resized, with D of them. Both runs are read operator by operator
(`fastmorph.graph.streams.walk`), and of every tensor it is known what the grown model has in the place of the old one's: old
channels are the old numbers times a factor, for norms add eps, so that the stream must come in the size that they expect: its
writers are multiplied by s = sqrt(D / d). New channels are of one of these kinds:

- "zero": the axis fill where norms take a mean of squares (RMSNorm);
- "mean": the axis fill where norms subtract a mean (LayerNorm): new channels are the mean of the old ones, which leaves the
  mean, and lets the variance be d / D of what it was;
- "turned": all channels are P x, with P (D, d) of orthonormal columns, which leaves sums of squares. Where norms subtract a
  mean, P takes the vector of ones to a multiple of it.

The factors of weights are unknowns, which equations decide: sums need equal factors, and what is not linear needs the numbers
that it had. The first operator without a rule, or whose equation cannot hold, is the reason of a refusal.

Sources: the invariance is SliceGPT's (Ashkboos et al., 2024), the means are LEMON's (Wang et al., 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeGuard

from fastmorph.graph.streams.scales import ONE, Scale, Scales, Unknown
from fastmorph.graph.tape import Ref
from fastmorph.outputs import Path

Kind = Literal["zero", "mean", "turned"]
New = Literal["zero", "mean", "turned", "any"]  # what new channels of a tensor are; "any": some number, the same for all or not


class Stuck(Exception):
    """No such growth: a clause about an operator; or a `whole` one."""

    def __init__(self, cause: str, *, whole: bool = False) -> None:
        super().__init__(cause)
        self.whole = whole


@dataclass(frozen=True)
class Change:
    """How a parameter or buffer with channels of the stream changes.

    Attributes:
        factor: its entries, plus `offset`, are multiplied by this.
        offset: what code adds to it before it multiplies (Gemma's norms multiply by 1 + w).
        made: what new channels are that it writes into the stream; None: it writes none.
        behind: the vectors that multiply what it writes before it reaches the stream (LayerScale), by name.
        read: what new channels are over which it sums, as a weight; None: it sums over none.
        absorbs: "turned": the gains of a norm that it takes over, by name.
        gain: whether it multiplies channels.
        shifts: "turned": the gains of the norm to whose result it is added.
    """

    factor: float
    offset: float = 0.0
    made: New | None = None
    behind: tuple[str, ...] = ()
    read: New | None = None
    absorbs: tuple[str, ...] = ()
    gain: bool = False
    shifts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """A growth of a stream.

    Attributes:
        kind: what new channels are.
        centred: whether norms subtract a mean.
        changes: by parameter or buffer.
        outputs: the model's outputs that are as wide as the stream.
    """

    kind: Kind
    centred: bool
    changes: dict[str, Change] = field(default_factory=dict)
    outputs: dict[Path, WiderOutput] = field(default_factory=dict)


@dataclass(frozen=True)
class WiderOutput:
    """An output of the model that is as wide as the stream.

    Attributes:
        dim: the dimension of its channels.
        factor: its old channels are times this, after the turn if there is one, and
        absorbs: without these gains of a norm, by name.
    """

    dim: int
    factor: float
    absorbs: tuple[str, ...] = ()


@dataclass(eq=False)
class Fill:
    """What the new channels of some tensors are, all alike.

    Attributes:
        new: None: it is still open, and whatever meets them decides.
        makers: the parameters that make them, with the vectors that multiply behind each, until that is decided.
        into: the fill that this one was merged into.
    """

    new: New | None
    makers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    into: Fill | None = None

    @property
    def root(self) -> Fill:
        """The fill that counts."""
        return self if self.into is None else self.into.root


@dataclass(frozen=True, eq=False)
class State:
    """What the grown model has in a tensor's place.

    Attributes:
        scale: old numbers are times this.
        fill: what its new channels are; None: it has no channels of the stream, or one number for all.
        of: of a mean over channels, the state of these.
        leaf: the parameter or buffer that it is, seen in some way.
        absorbs: "turned": the gains that the old model multiplies by, and the grown one leaves to the readers.
        squared: "turned": whether it holds squares, of which the sum alone is known.
    """

    scale: Scale
    fill: Fill | None = None
    of: State | None = None
    leaf: str = ""
    absorbs: tuple[str, ...] = ()
    squared: bool = False


def streams(state: State | None) -> TypeGuard[State]:
    """Whether a tensor has channels of the stream."""
    return state is not None and state.fill is not None


class Algebra:
    """Everything that is known of a growth while runs are read.

    Args:
        kind: what new channels are to be.
        centred: whether norms subtract a mean.
        grown: how many of its dimensions grow, for each parameter and buffer that does.
        readers: those of them that sum over channels.
        several: those of them that hold the stream several times along one dimension.
        sizes: d and D.
    """

    def __init__(
        self,
        kind: Kind,
        centred: bool,
        grown: dict[str, int],
        readers: set[str],
        several: set[str],
        sizes: tuple[int, int],
    ) -> None:
        self.kind, self.centred, self.grown, self.sizes = kind, centred, grown, sizes
        self.wider = math.log(sizes[1] / sizes[0])  # of s squared
        self.gains: set[str] = set()
        self.shifts: dict[str, tuple[str, ...]] = {}
        self._readers, self._several = readers, several
        self._scales = Scales(self._rank)
        self._made: dict[str, tuple[New, tuple[str, ...]]] = {}
        self._read: dict[str, list[State]] = {}
        self._offsets: dict[str, set[float]] = {}
        self._dims: dict[str, int] = {}
        self._free = 0

    def _rank(self, unknown: Unknown) -> tuple[bool, int]:
        """Readers keep their size where they can; of a layer and of what multiplies its result, the layer changes."""
        name = unknown[0]
        return name in self._readers, -self._dims.get(name, 99)

    # --- states ---------------------------------------------------------------------------------------------------------------

    def leaf(self, ref: Ref) -> State:
        """The state of a parameter or buffer that grows."""
        self._dims[ref.name] = len(ref.shape)
        return State(_unknown(ref.name, 0.0), self.open({ref.name: ()}), leaf=ref.name)

    def open(self, makers: dict[str, tuple[str, ...]]) -> Fill:
        """New channels that are what is needed: there is a choice where norms subtract a mean."""
        return Fill(None if self.kind == "mean" else self.kind, makers)

    def zeros(self) -> State:
        """The state of channels of zeros, which are times anything."""
        self._free += 1
        return State(Scale((((("", self._free)), 1.0),)), self.open({}))

    def plus(self, leaf: State, number: float) -> State:
        """A parameter with a number added. Raises Stuck where it has been multiplied before."""
        if len(leaf.scale.powers) != 1 or leaf.scale.log or leaf.scale.powers[0][0][0] != leaf.leaf:
            raise Stuck(f"a number is added to a multiple of {leaf.leaf!r}")
        return State(_unknown(leaf.leaf, leaf.scale.powers[0][0][1] + number), leaf.fill, leaf=leaf.leaf)

    def multiply(self, gain: State) -> Scale:
        """Note a vector that multiplies channels, and return by what factor it changes their size.

        "turned": it becomes ones, and what reads the channels, or makes them, takes it over.
        """
        if gain.leaf in self._several:
            raise Stuck("multiplies several of them, one behind the other, by vectors")
        self.gains.add(gain.leaf)
        if self.kind != "turned":
            return gain.scale
        own = self.plus(gain, 0.0).scale
        self._offsets.setdefault(gain.leaf, set()).add(own.powers[0][0][1])
        return ONE

    # --- equations ------------------------------------------------------------------------------------------------------------

    def equate(self, one: Scale, two: Scale = ONE) -> None:
        """Let two factors be equal. Raises Stuck where they cannot be."""
        for name, offset in (unknown for unknown, _ in (one - two).powers):
            self._offsets.setdefault(name, set()).add(offset)
        if not self._scales.equate(one, two):
            raise Stuck("needs them in another size than others do")

    def is_one(self, scale: Scale) -> bool:
        """Whether the factor is 1, as far as is known."""
        return self._scales.is_one(scale)

    def settle(self, state: State, new: New) -> None:
        """Let new channels be this. Raises Stuck where they are something else."""
        assert state.fill is not None
        fill = state.fill.root
        if fill.new not in (None, new):
            raise Stuck(f"needs new channels that are {_ARE[new]}, and these are {_ARE[fill.new]}")
        fill.new = new
        for name, behind in fill.makers.items():
            if self._made.setdefault(name, (new, behind)) != (new, behind):
                raise Stuck(f"gets channels from {name!r}, which makes others elsewhere")
            self._check_tie(name)
        fill.makers = {}

    def _check_tie(self, name: str) -> None:
        if self.kind == "turned" and name in self._made and name in self._read and self.grown[name] == 1:
            raise Stuck(
                f"{name!r} both makes them and sums over them (a tied weight), and cannot take over a norm's gains as well; "
                "untie it first (untie=True of fm.transformers.grow), or use fill='zero', which keeps the tie",
                whole=True,
            )

    def merge(self, one: State, two: State) -> Fill:
        """Let the new channels of two states be the same. Raises Stuck where they are not."""
        assert one.fill is not None
        assert two.fill is not None
        first, second = one.fill.root, two.fill.root
        if first is second:
            return first
        if first.new != second.new or (first.new is not None and not (first.makers and second.makers)):
            new = first.new or second.new  # one of them is the stream itself
            assert new is not None
            self.settle(two, new)
            self.settle(one, new)
        for name, behind in second.makers.items():
            if first.makers.setdefault(name, behind) != behind:
                raise Stuck(f"gets channels from {name!r} in two ways")
        second.into = first
        return first

    def read(self, name: str, state: State) -> None:
        """Note that a weight sums over channels."""
        assert state.fill is not None
        if self.kind != "mean":
            self.settle(state, self.kind)
        elif state.fill.root.new == "any":
            raise Stuck("sums over new channels that are no zeros")
        self._read.setdefault(name, []).append(state)
        self._check_tie(name)

    # --- what it comes to -----------------------------------------------------------------------------------------------------

    def changes(self) -> dict[str, Change]:
        """What becomes of each parameter, once all runs have been read. Raises Stuck."""
        for name, offsets in self._offsets.items():
            for offset in offsets if len(offsets) > 1 else ():
                self.equate(_unknown(name, offset))
        return {name: self._change(name) for name in self.grown}

    def _change(self, name: str) -> Change:
        states = self._read.get(name, [])
        for state in states:
            if state.fill is not None and state.fill.root.new is None:
                self.settle(state, "zero")
        made, behind = self._made.get(name, (None, ()))
        if len({state.absorbs for state in states}) > 1:
            raise Stuck(
                f"{name!r} reads them behind several norms, and cannot take over the gains of all; use fill='zero'", whole=True
            )
        kinds = {state.fill.root.new for state in states if state.fill is not None}
        read: New | None = next((new for new in ("mean", "turned", "zero") if new in kinds), None)
        (offset,) = self._offsets.get(name) or {0.0}
        absorbs = states[0].absorbs if states else ()
        gain, shifts = name in self.gains, self.shifts.get(name, ())
        return Change(self.factor(_unknown(name, offset)), offset, made, behind, read, absorbs, gain, shifts)

    def factor(self, scale: Scale) -> float:
        """A factor as a number: exactly a power of s where it is one."""
        log = self._scales.log_of(scale)
        power = 2 * log / self.wider
        if abs(power - round(power)) < _EXACT:
            return float((self.sizes[1] / self.sizes[0]) ** (round(power) / 2))
        return math.exp(log)

    def output(self, dim: int, state: State) -> WiderOutput:
        """What is known of an output as wide as the stream."""
        if state.fill is not None and state.fill.root.new is None:
            self.settle(state, "zero")
        return WiderOutput(dim, self.factor(state.scale), state.absorbs)


_EXACT = 1e-6  # of a power of s
_ARE: dict[New | None, str] = {
    "zero": "zero",
    "mean": "the mean of the old ones",
    "turned": "turned with the old ones",
    "any": "something else",
}


def _unknown(name: str, offset: float) -> Scale:
    """The factor of a parameter plus a number."""
    return Scale((((name, offset), 1.0),))
