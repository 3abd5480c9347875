"""Rules of operators that move, join, drop and look up data."""

from __future__ import annotations

import math

from fastmorph.graph.streams.algebra import State, Stuck, streams
from fastmorph.graph.streams.scales import ONE
from fastmorph.graph.streams.walk import SIZED, Results, Walk, plain
from fastmorph.graph.tape import Ref


def moved(walk: Walk) -> Results:
    """The same numbers, elsewhere."""
    (old, *_), (new, *_) = walk.old.refs, walk.new.refs
    state = walk.states[new.key]
    assert state is not None
    dim = walk.new.args.get("dim")
    along = isinstance(dim, int) and dim < len(old.shape) and old.shape[dim] != new.shape[dim]
    if walk.new.name not in SIZED and not along:
        walk.same()
    if not streams(state):
        for before, after in zip(walk.old.outs, walk.new.outs, strict=True):
            if before.shape != after.shape and walk.new.name != "expand":
                raise Stuck("makes a tensor of another size than before")
        return [state] * len(walk.new.outs)
    held = walk.grown(old, new)
    if along and walk.new.name in ("slice", "narrow", "select"):
        walk.once(new, held[0])
    for before, after in zip(walk.old.outs, walk.new.outs, strict=True):
        found = walk.grown(before, after)
        if len(found) != len(held):
            raise Stuck("cuts them or takes some of them alone")
        if walk.new.name in SIZED[:-1] and before.shape != old.shape:
            behind = [math.prod(shape[dims[0] + 1 :]) for shape, dims in ((old.shape, held), (before.shape, found))]
            if len(held) != 1 or behind[0] != behind[1]:
                raise Stuck("mixes them with positions")
    if walk.new.name in ("flip", "roll", "rot90", "tril", "triu", "diagonal", "unfold", "pixel_shuffle", "pixel_unshuffle"):
        raise Stuck("puts them in another order")
    return [state] * len(walk.new.outs)


def joined(walk: Walk) -> State:
    """Tensors behind each other, or on each other, along another dimension than that of the channels."""
    olds, news = walk.old.refs, walk.new.refs
    pairs = [(a, b) for a, b in zip(olds, news, strict=True) if math.prod(b.shape)]
    states = [walk.states[new.key] for _, new in pairs]
    first = states[0]
    walk.same()
    if not any(streams(state) for state in states):
        for state in states[1:]:
            walk.algebra.equate(ONE if state is None else state.scale, ONE if first is None else first.scale)
        if any(a.shape != b.shape for a, b in zip(walk.old.outs, walk.new.outs, strict=True)):
            raise Stuck("makes a tensor of another size than before")
        return State(ONE if first is None else first.scale)
    held = [state for state in states if streams(state)]
    if len(held) < len(states) or any(state.absorbs != held[0].absorbs or state.squared for state in held):
        raise Stuck("joins them with something else")
    walk.channels(walk.old.outs[0], walk.new.outs[0])
    return _alike(walk, held)


def _alike(walk: Walk, states: list[State]) -> State:
    """Tensors with channels, side by side in one."""
    first, fill = states[0], states[0].fill
    for state in states[1:]:
        walk.algebra.equate(first.scale, state.scale)
        fill = walk.algebra.merge(first, state)
    return State(first.scale, fill, absorbs=first.absorbs)


def resized(walk: Walk) -> State | None:
    """Means and interpolations along space, channel by channel."""
    state = walk.states[walk.new.refs[0].key]
    walk.same()
    if not streams(state) or state.squared:
        return plain(walk)
    (old, *_), (new, *_) = walk.old.refs, walk.new.refs
    dims = next(int(digit) for digit in walk.new.name if digit in "123")
    if walk.channels(old, new) >= len(new.shape) - dims:
        raise Stuck("mixes them")
    return State(state.scale, state.fill, absorbs=state.absorbs)


def chosen(walk: Walk) -> State | None:
    """where: each place from one of two tensors."""
    states = [walk.operand(name) for name in ("self", "other")]
    held = [state for state in states if streams(state)]
    if walk.operand("condition") is not None or len(held) != 2 or any(state.absorbs or state.squared for state in held):
        return plain(walk)
    walk.across()
    return _alike(walk, held)


def looked_up(walk: Walk) -> State | None:
    """Rows by their numbers."""
    state = walk.operand("self")
    states = [walk.states[ref.key] for ref in walk.new.refs[1:]]
    walk.same()
    if any(states) or not streams(state):
        return plain(walk)
    if state.fill is not None:
        dim = walk.channels(*walk.pair("self"))
        indices = walk.new.args.get("indices", ())
        taken = [place for place, index in enumerate(indices) if index is not None] or [int(walk.new.args["dim"])]
        if dim in [place % len(walk.pair("self")[1].shape) for place in taken]:
            raise Stuck("looks them up by their number")
        walk.channels(walk.old.outs[0], walk.new.outs[0])
    return state


def added_at(walk: Walk) -> State | None:
    """index_add: rows of `source` are added to rows of `self`."""
    one, two = walk.operand("self"), walk.operand("source")
    walk.same()
    if not streams(one) or not streams(two) or one.absorbs or two.absorbs or one.squared or two.squared:
        return plain(walk)
    if walk.channels(*walk.pair("self")) == walk.new.args["dim"] % len(walk.pair("self")[1].shape):
        raise Stuck("looks them up by their number")
    walk.algebra.equate(one.scale, two.scale)
    return State(one.scale, walk.algebra.merge(one, two))


def masked(walk: Walk) -> State | None:
    """Zeros at some places."""
    state = walk.operand("self")
    walk.same()
    value = walk.new.args["value"]
    number = value.value[0] if isinstance(value, Ref) and value.value else value
    if state is None or walk.operand("mask") is not None or number != 0:
        return plain(walk)
    return state


def copied(walk: Walk) -> State | None:
    """The second operand, written over the first one."""
    state = walk.operand("src")
    if not streams(state) and walk.old.outs[0].shape != walk.new.outs[0].shape:
        return plain(walk)
    return state


def zeros_like(walk: Walk) -> State | None:
    """A new tensor of zeros."""
    return None if walk.old.outs[0].shape == walk.new.outs[0].shape else walk.algebra.zeros()


def dropped_out(walk: Walk) -> Results:
    """In eval mode: the same."""
    if walk.new.args.get("train", walk.new.args.get("training")) is not False:
        plain(walk)
    return [walk.states[walk.new.refs[0].key], None][: len(walk.new.outs)]
