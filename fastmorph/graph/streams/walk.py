"""Two runs read side by side, operator by operator.

A rule says what the grown model has in the place of an operator's results, given what it has in the place of the operands. An
operator without a rule may take no channels of the stream, and what it takes must be what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastmorph.graph.streams.algebra import Algebra, State, Stuck, streams
from fastmorph.graph.streams.scales import ONE, Scale
from fastmorph.graph.tape import Ref, Tape
from fastmorph.outputs import Path

Results = Sequence[State | None]
Rule = Callable[["Walk"], State | Results | None]


class Walk:
    """One run of both models.

    Args:
        algebra: what is known of the growth; it learns from the run.
        old: what the model did, and
        new: what the resized model did.
        rules: by an operator's name.

    Attributes:
        outputs: of the model's outputs that are as wide as the stream, the dimension and the state, by path.
        kept: whether some output of floating numbers is as it was.
        entry: how many operators were read.
        states: what is known of the tensors that are in use.
    """

    def __init__(self, algebra: Algebra, old: Tape, new: Tape, rules: Mapping[str, Rule]) -> None:
        self.algebra = algebra
        self.outputs: dict[Path, tuple[int, State]] = {}
        self.kept = False
        self.entry = 0
        self._tapes, self._rules = (old, new), rules
        self.states: dict[int, State | None] = {}
        self._memory: dict[int, set[int]] = {}
        self._stale: set[int] = set()

    def read(self) -> None:
        """Read the run. Raises Stuck, with the module, for what does not fit into the growth."""
        old, new = self._tapes
        for self.old, self.new in zip(old.entries, new.entries, strict=False):
            self.entry += 1
            try:
                self._step()
            except Stuck as error:
                if error.whole:
                    raise
                module = f"module {self.new.module!r}" if self.new.module else "the model itself"
                raise Stuck(f"{module} runs {self.new.name} on them, which {error}") from None
        if len(old.entries) != len(new.entries):
            raise Stuck("the model would run other operators")
        for (path, before), (_, after) in zip(old.outputs, new.outputs, strict=True):
            state = self._state(before, after)
            if not streams(state):
                self.kept |= after.floating and math.prod(after.shape) > 1  # a mean of a stream is no output beside it
                self.unchanged([state], "an output of the model")
                if before.shape != after.shape:
                    raise Stuck("the model's output would have another shape")
            else:
                self.outputs[path] = self.channels(before, after), state

    def _step(self) -> None:
        old, new = self.old, self.new
        olds, news = old.refs, new.refs
        if (old.module, old.name, len(olds), len(old.outs)) != (new.module, new.name, len(news), len(new.outs)):
            raise Stuck(f"was {old.name} in {old.module!r} before")
        states = [self._state(before, after) for before, after in zip(olds, news, strict=True)]
        changed = old.numbers != new.numbers
        if all(state is None for state in states) and not (changed and new.name in ("mul", "div")):
            found: State | Results | None = self._made_of_nothing(changed)
        else:
            rule = self._rules.get(new.name, plain)
            found = rule(self)
        results = found if isinstance(found, Sequence) else [found] * len(new.outs)
        for out, state in zip(new.outs, [*results, *[None] * len(new.outs)], strict=False):
            self._set(out, state, writes=any(out.key == ref.key for ref in news))

    # --- states ---------------------------------------------------------------------------------------------------------------

    def _state(self, old: Ref, new: Ref) -> State | None:
        """What stands in a tensor's place; None: the same numbers."""
        if new.key in self._stale:
            raise Stuck("takes a tensor of which a part was written elsewhere")
        if new.key not in self.states:
            state = None
            if new.name in self.algebra.grown:
                state = self.algebra.leaf(new)
            elif old.value != new.value:
                state = State(self.ratio(old.value, new.value))
            elif old.shape != new.shape:
                raise Stuck("takes a tensor of another size than before")
            self._set(new, state)
        return self.states[new.key]

    def _set(self, ref: Ref, state: State | None, *, writes: bool = False) -> None:
        others = self._memory.setdefault(ref.memory, set())
        if writes and self.states.get(ref.key) is not state:
            before = self.states.get(ref.key)
            alike = state is not None and before is not None and self._alike(before, state)
            for other in others - {ref.key}:
                if alike and self.states.get(other) is before:
                    self.states[other] = state
                elif self.states.get(other) is not state:
                    self._stale.add(other)
        others.add(ref.key)
        self._stale.discard(ref.key)
        self.states[ref.key] = state

    def _alike(self, one: State, two: State) -> bool:
        same = one.fill is two.fill or (one.fill is not None and two.fill is not None and one.fill.root is two.fill.root)
        return same and self.algebra.is_one(one.scale - two.scale) and one.absorbs == two.absorbs

    def operand(self, name: str) -> State | None:
        """The state of an argument; None for a number, and for what is as it was."""
        value = self.new.args.get(name)
        return self.states[value.key] if isinstance(value, Ref) else None

    def pair(self, name: str) -> tuple[Any, Any]:
        """An argument in both runs."""
        return self.old.args.get(name), self.new.args.get(name)

    def _made_of_nothing(self, changed: bool) -> State | None:
        """Results of operands that are as they were, or of none."""
        shapes = [(old.shape, new.shape) for old, new in zip(self.old.outs, self.new.outs, strict=True)]
        name = self.new.name
        if all(old == new for old, new in shapes):
            if changed and name in _CONSTANT:
                key = "s" if name == "scalar_tensor" else "fill_value"
                return State(self.ratio(*self.pair(key)))
            if name not in SIZED:
                self.same()
            return None
        if name in _ZEROS or (name in _CONSTANT and self.new.args.get("fill_value") == 0):
            return self.algebra.zeros()
        if name in ("expand", *_CONSTANT):  # one number for all channels
            return State(ONE)
        raise Stuck("makes a tensor of another size than before")

    def same(self, *names: str) -> None:
        """Raise Stuck where one of the numbers among the arguments is another in the grown model; all, without names."""
        if self.new.name in _CUTS and any(ref.cut for ref in self.new.refs):
            return  # the sizes of results say all
        pairs = zip(self.old.numbers, self.new.numbers, strict=True)
        for (name, old), (_, new) in pairs:
            if old != new and (not names or name in names):
                raise Stuck(f"takes {name}={new} instead of {old}")

    # --- what rules ask -------------------------------------------------------------------------------------------------------

    def ratio(self, old: Any, new: Any) -> Scale:
        """By what numbers differ between the runs. Raises Stuck unless that is one positive factor."""
        if old == new:
            return ONE
        if old is None or new is None:
            raise Stuck("takes numbers that are not known")
        olds, news = (value if isinstance(value, tuple) else (value,) for value in (old, new))
        factors = [b / a for a, b in zip(olds, news, strict=False) if a and not isinstance(a, bool)]
        one = factors and len(factors) == len(olds) == len(news) and min(factors) > 0
        if not one or max(factors) / min(factors) - 1 > _ROUNDING:
            raise Stuck(f"takes {new} instead of {old}")
        return Scale((), math.log(factors[0]))

    def channels(self, old: Ref, new: Ref) -> int:
        """The dimension along which a tensor has channels of the stream. Raises Stuck unless there is one."""
        found = self.grown(old, new)
        if len(found) != 1:
            raise Stuck("has them along several dimensions" if found else "cuts them or takes some of them alone")
        return found[0]

    def grown(self, old: Ref, new: Ref) -> list[int]:
        """The dimensions of other sizes: each holds d channels and now D, once or several times, one behind the other."""
        if len(old.shape) != len(new.shape):
            raise Stuck("has another number of dimensions")
        pairs = zip(old.shape, new.shape, strict=True)
        found = [dim for dim, (before, after) in enumerate(pairs) if before != after]
        small, large = self.algebra.sizes
        if any(old.shape[dim] % small or new.shape[dim] != old.shape[dim] // small * large for dim in found):
            raise Stuck("cuts them, or joins them with others, or with themselves")
        return found

    def once(self, ref: Ref, dim: int) -> None:
        """Raise Stuck where a dimension holds the stream several times."""
        if ref.shape[dim] != self.algebra.sizes[1]:
            raise Stuck("takes several of them together, one behind the other")

    def unchanged(self, states: Sequence[State | None], does: str) -> None:
        """Let tensors be what they were. Raises Stuck where their size has changed."""
        for state in states:
            if state is not None:
                try:
                    self.algebra.equate(state.scale)
                except Stuck:
                    raise Stuck(f"{does} needs the numbers that it had, and their size has changed") from None

    def scalar(self, name: str) -> Scale:
        """The factor of an argument: a number, or a tensor."""
        state = self.operand(name)
        old, new = self.pair(name)
        if isinstance(new, Ref):
            return ONE if state is None else state.scale
        return self.ratio(old, new)

    def across(self) -> None:
        """Raise Stuck unless all operands of an elementwise operator have their channels where the result has them."""
        places = set()
        for old, new in [*zip(self.old.refs, self.new.refs, strict=True), *zip(self.old.outs, self.new.outs, strict=True)]:
            state = self.states.get(new.key)
            if streams(state) or new in self.new.outs:
                places |= {dim - len(new.shape) for dim in self.grown(old, new)}
        if len(places) > 1:
            raise Stuck("combines channels with each other")


def plain(walk: Walk) -> State | None:
    """An operator without a rule: it may take no channels, and takes what it took."""
    states = [walk.states[ref.key] for ref in walk.new.refs]
    if any(streams(state) for state in states):
        raise Stuck("is not linear in them, and no rule says what it does with a stream of another width")
    walk.unchanged(states, "it")
    walk.same()
    refs = [*zip(walk.old.refs, walk.new.refs, strict=True), *zip(walk.old.outs, walk.new.outs, strict=True)]
    if any(old.shape != new.shape for old, new in refs):
        raise Stuck("takes or makes a tensor of another size than before")
    return None


_ROUNDING = 1e-6  # of numbers that models keep in float32
_ZEROS = ("zeros", "new_zeros")
SIZED = ("view", "_unsafe_view", "reshape", "_reshape_alias", "expand")  # operators that take the sizes of results
_CUTS = ("split", "split_with_sizes", "slice", "narrow")
_CONSTANT = ("full", "new_full", "scalar_tensor", "ones", "new_ones")
