"""Rules of elementwise operators."""

from __future__ import annotations

from fastmorph.graph.streams.algebra import Fill, State, Stuck, streams
from fastmorph.graph.streams.scales import ONE, Scale
from fastmorph.graph.streams.walk import Rule, Walk, plain
from fastmorph.graph.tape import Ref


def add(walk: Walk) -> State | None:
    """self + alpha other, or self - alpha other."""
    walk.same()
    walk.across()
    one, two = (walk.operand(name) for name in ("self", "other"))
    if any(state is not None and state.squared for state in (one, two)):
        return plain(walk)
    once = walk.new.args.get("alpha", 1) == 1
    if streams(one) and streams(two):
        return total(walk, one, two, times=0 if not once else -1 if walk.new.name == "sub" else 1)
    if (streams(one) or streams(two)) and not once:
        return plain(walk)
    if streams(one):
        return _with_constant(walk, one, two, "other")
    if streams(two):
        return _with_constant(walk, two, one, "self")
    scales = [ONE if state is None else state.scale for state in (one, two)]
    walk.algebra.equate(*scales)
    return State(scales[0])


def total(walk: Walk, one: State, two: State, *, times: int) -> State:
    """The sum of a tensor with channels and another one, times 1, -1, or (0) another number."""
    algebra = walk.algebra
    for norm, bias in ((one, two), (two, one)):
        if norm.absorbs and bias.leaf and not bias.absorbs and times == 1:
            algebra.equate(bias.scale, norm.scale)
            if algebra.shifts.setdefault(bias.leaf, norm.absorbs) != norm.absorbs:
                raise Stuck(f"adds {bias.leaf!r} behind several norms")
            return norm
    if one.absorbs or two.absorbs:
        raise Stuck("adds to the stream what the gains of a norm have scaled, channel by channel; use fill='zero'")
    algebra.equate(one.scale, two.scale)
    return State(one.scale, algebra.merge(one, two))


def _with_constant(walk: Walk, stream: State, constant: State | None, name: str) -> State:
    """A sum of channels with what is the same for all of them."""
    algebra = walk.algebra
    scale = ONE if constant is None else constant.scale
    number = walk.new.args[name]
    if isinstance(number, Ref) and number.value is not None and len(set(number.value)) == 1:
        number = number.value[0]
    if stream.leaf and isinstance(number, int | float):
        sign = -1 if walk.new.name == "sub" else 1
        if sign < 0 and name == "self":
            raise Stuck("takes a parameter away from a number")
        return algebra.plus(stream, sign * float(number))
    if constant is not None and constant.of is stream and walk.new.name == "sub" and name == "other":
        if algebra.kind == "turned":
            algebra.equate(constant.scale, stream.scale + Scale((), -algebra.wider / 2))
            return State(stream.scale, algebra.open({}))
        algebra.equate(constant.scale, stream.scale)
        return State(stream.scale, Fill("zero"))
    if algebra.kind == "turned":
        raise Stuck("adds one number to all of them")
    algebra.equate(stream.scale, scale)
    assert stream.fill is not None
    return State(stream.scale, stream.fill if stream.fill.root.new == "mean" else Fill("any"))


def mul(walk: Walk) -> State | None:
    """Products, and quotients by a number or by what is the same for all channels."""
    walk.across()
    divides = walk.new.name == "div"
    one, two = walk.operand("self"), walk.operand("other")
    if walk.new.args.get("rounding_mode") is not None:
        return plain(walk)
    if streams(two):
        if divides:
            return plain(walk)
        if streams(one):
            return _product(walk, one, two)
        one, two, first = two, one, walk.scalar("self")
    else:
        first = walk.scalar("other")
    if one is not None and one.squared:
        return plain(walk)
    scale = (ONE if one is None else one.scale) + first * (-1.0 if divides else 1.0)
    if not streams(one):
        return None if walk.algebra.is_one(scale) else State(scale)
    return State(scale, one.fill, absorbs=one.absorbs)


def _product(walk: Walk, one: State, two: State) -> State:
    """Of two tensors with channels: a square, a vector's, or a gate's."""
    if one is two:
        return power(walk, one, 2.0)
    if two.leaf and not one.leaf:
        return gained(walk, one, two)
    if one.leaf and not two.leaf:
        return gained(walk, two, one)
    news = {state.fill.root.new for state in (one, two) if state.fill is not None}
    if walk.algebra.kind == "turned" or "zero" not in news:
        raise Stuck("multiplies channels by channels, which leaves no stream")
    return State(one.scale + two.scale, Fill("zero"))


def gained(walk: Walk, stream: State, gain: State) -> State:
    """Channels times a vector of the model's: the gains of a norm, or those behind a layer."""
    algebra = walk.algebra
    assert stream.fill is not None
    fill = stream.fill.root
    makers = {maker: (*behind, gain.leaf) for maker, behind in fill.makers.items()}
    scale = stream.scale + algebra.multiply(gain)
    if stream.squared or (fill.new == "mean" and not makers):
        raise Stuck("multiplies the stream itself, channel by channel, and changes its mean")
    absorbs = (*stream.absorbs, gain.leaf) if algebra.kind == "turned" and not makers else ()
    return State(scale, Fill(fill.new, makers), absorbs=absorbs)


def power(walk: Walk, state: State, power: float) -> State:
    """x to a power."""
    if state.fill is None:
        return State(state.scale * power)
    if power == 2 and walk.algebra.kind == "turned":
        if state.absorbs or state.squared:
            raise Stuck("takes the square of what the gains of a norm have scaled")
        walk.algebra.settle(state, "turned")
        return State(state.scale * 2, Fill("turned"), squared=True)
    if power <= 0 or walk.algebra.kind == "turned":
        raise Stuck("is not linear in them")
    walk.algebra.settle(state, "zero")
    return State(state.scale * power, Fill("zero"))


def pow_(walk: Walk) -> State | None:
    """x to a number."""
    walk.same()
    state, exponent = walk.operand("self"), walk.new.args["exponent"]
    if state is None or not isinstance(exponent, int | float):
        return plain(walk)
    return power(walk, state, float(exponent))


def of_power(exponent: float) -> Rule:
    """The rule of an operator that takes x to this power."""

    def rule(walk: Walk) -> State | None:
        state = walk.operand("self")
        assert state is not None
        return power(walk, state, exponent)

    return rule


def homogeneous(walk: Walk) -> State | None:
    """f(a x) = a f(x) for a > 0, and f(0) = 0."""
    state = walk.operand("self")
    assert state is not None
    walk.same()
    if not streams(state):
        return State(state.scale)
    if walk.algebra.kind == "turned":
        return plain(walk)
    walk.algebra.settle(state, "zero")
    return State(state.scale, Fill("zero"))


def negated(walk: Walk) -> State | None:
    """-x."""
    state = walk.operand("self")
    assert state is not None
    return plain(walk) if state.squared else State(state.scale, state.fill, absorbs=state.absorbs)


def keeps_zero(walk: Walk) -> State | None:
    """f(0) = 0: new channels of zeros stay; old ones must be what they were."""
    state = walk.operand("self")
    if not streams(state) or walk.algebra.kind == "turned":
        return plain(walk)
    walk.same()
    walk.unchanged([state], "it")
    walk.algebra.settle(state, "zero")
    return State(ONE, Fill("zero"))
