"""Rules of operators that sum up along dimensions, norms among them."""

from __future__ import annotations

from fastmorph.graph.streams.algebra import Fill, State, Stuck, streams
from fastmorph.graph.streams.pointwise import gained, total
from fastmorph.graph.streams.scales import Scale
from fastmorph.graph.streams.walk import Results, Walk, plain


def _reduced(walk: Walk) -> tuple[State, bool, bool]:
    """The operand's state, whether its channels are reduced, and whether nothing else is."""
    (old, *_), (new, *_) = walk.old.refs, walk.new.refs
    state = walk.states[new.key]
    assert state is not None
    given = walk.new.args.get("dim")
    dims = range(len(new.shape)) if given in (None, ()) else [given] if isinstance(given, int) else given
    places = {dim % len(new.shape) for dim in dims}
    if not streams(state):
        if old.shape != new.shape:
            raise Stuck("sums up one number for all of them")
        return state, False, False
    channels = walk.channels(old, new)
    if channels in places:
        walk.once(new, channels)
    return state, channels in places, places == {channels}


def mean(walk: Walk) -> State | None:
    """A mean or a sum."""
    algebra = walk.algebra
    state, over, alone = _reduced(walk)
    if not over:
        if state.squared:
            return plain(walk)
        return State(state.scale, state.fill, absorbs=state.absorbs)
    wider = Scale((), algebra.wider)
    scale = state.scale - wider if walk.new.name == "mean" else state.scale  # of what is summed up
    if algebra.kind == "turned":
        if state.absorbs:
            raise Stuck("sums up what the gains of a norm have scaled")
        if state.squared:
            return State(scale)
        if not algebra.centred:
            raise Stuck("takes their mean")
        algebra.settle(state, "turned")
        return State(scale + wider * 0.5, of=state if alone and walk.new.name == "mean" else None)
    assert state.fill is not None
    if state.fill.root.new is None:
        algebra.settle(state, "mean")
    if state.fill.root.new == "any":
        raise Stuck("takes their mean")
    if state.fill.root.new == "mean":
        return State(scale + wider, of=state if alone and walk.new.name == "mean" else None)
    return State(scale)


def variance(walk: Walk) -> Results:
    """The variance over channels, or its root, and the mean."""
    algebra = walk.algebra
    state, over, alone = _reduced(walk)
    power = 1.0 if walk.new.name.startswith("var") else 0.5
    biased = walk.new.args.get("correction") == 0 or walk.new.args.get("unbiased") is False
    if not (over and alone and biased):
        raise Stuck("divides the sum of squares by one less than their number, or takes the variance of more than them")
    settle_centred(walk, state)
    spread = State((state.scale * 2 - Scale((), algebra.wider)) * power)
    return [spread, _mean_of(walk, state)]


def _mean_of(walk: Walk, state: State) -> State:
    """Of channels of which a mean is taken away."""
    less = walk.algebra.wider / 2 if walk.algebra.kind == "turned" else 0.0
    return State(state.scale - Scale((), less), of=state)


def settle_centred(walk: Walk, state: State) -> None:
    """Channels of which a norm takes the mean away."""
    algebra = walk.algebra
    if algebra.kind == "zero" or (algebra.kind == "turned" and not algebra.centred):
        raise Stuck("takes their mean away")
    if state.absorbs or state.squared:
        raise Stuck("normalises what the gains of another norm have scaled; use fill='zero'")
    algebra.settle(state, algebra.kind)


def length(walk: Walk) -> State | None:
    """The root of the sum of squares."""
    state, over, _ = _reduced(walk)
    if walk.new.args.get("ord", walk.new.args.get("p", 2)) != 2 or not over or state.absorbs or state.squared:
        return plain(walk)
    walk.algebra.settle(state, "turned" if walk.algebra.kind == "turned" else "zero")
    return State(state.scale)


def layer_norm(walk: Walk) -> Results:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, or x / sqrt(mean(x^2) + eps) * weight."""
    algebra, (old, new) = walk.algebra, walk.pair("input")
    state = walk.operand("input")
    if not streams(state):
        plain(walk)
        return []
    walk.same("eps")
    if len(walk.new.args["normalized_shape"]) != 1 or walk.channels(old, new) != len(new.shape) - 1:
        raise Stuck("normalises over more than them, or over less")
    walk.once(new, -1)
    if walk.new.name.endswith("layer_norm"):
        settle_centred(walk, state)
    elif state.absorbs or state.squared:
        raise Stuck("normalises what the gains of another norm have scaled; use fill='zero'")
    else:
        algebra.settle(state, "turned" if algebra.kind == "turned" else "zero")
    algebra.equate(state.scale * 2, Scale((), algebra.wider))
    out = State(state.scale, Fill("turned" if algebra.kind == "turned" else "zero"))
    weight, bias = walk.operand("weight"), walk.operand("bias")
    if weight is not None:
        out = gained(walk, out, weight)
    if bias is not None:
        out = total(walk, out, bias, times=1)
    if walk.new.name.endswith("layer_norm"):
        return [out, _mean_of(walk, state)]
    return [out]  # what else it returns is what it was
