"""Rules of products that sum over channels, or make them."""

from __future__ import annotations

from collections.abc import Sequence

from fastmorph.graph.streams.algebra import State, Stuck, streams
from fastmorph.graph.streams.pointwise import total
from fastmorph.graph.streams.scales import ONE, Scale
from fastmorph.graph.streams.walk import Results, Walk, plain
from fastmorph.graph.tape import Ref


def matrix_product(walk: Walk) -> State | None:
    """(*, m, k) @ (*, k, n), with something added or nothing."""
    walk.same()
    names = [name for name, value in walk.new.args.items() if isinstance(value, Ref)]
    added, (one, two) = names[:-2], names[-2:]
    out = _contracted(walk, one, two)
    for name in added:
        other = walk.operand(name)
        if streams(out):
            if not streams(other):
                raise Stuck("adds one number to all of them")
            out = total(walk, out, other, times=1)
        elif streams(other):
            raise Stuck("adds them to something else")
        else:
            walk.unchanged([out, other], "the sum")
            out = None
    return out


def _contracted(walk: Walk, one: str, two: str) -> State | None:
    states = [walk.operand(name) for name in (one, two)]
    pairs = [walk.pair(name) for name in (one, two)]
    if any(not streams(state) and old.shape != new.shape for state, (old, new) in zip(states, pairs, strict=True)):
        raise Stuck("sums up one number for all of them")
    dims = [walk.grown(old, new) if streams(state) else [] for state, (old, new) in zip(states, pairs, strict=True)]
    last = [len(new.shape) - 1 for _, new in pairs]
    inner = (last[0], max(0, last[1] - 1))  # the dimension that is summed over
    scale = sum((state.scale for state in states if state is not None), ONE)
    summed = [place in own for place, own in zip(inner, dims, strict=True)]
    if any(summed):
        if not all(summed):
            raise Stuck("sums over a part of them")
        return _summed(walk, states, dims, scale)
    held = [state for state in states if streams(state)]
    if not held:
        return State(scale)
    if held[0].squared or len(held) > 1 or max(map(len, dims)) > 1:
        return plain(walk)
    return State(scale, held[0].fill, absorbs=held[0].absorbs)


def _summed(walk: Walk, states: Sequence[State | None], dims: Sequence[list[int]], scale: Scale) -> State | None:
    """A sum over channels: by a weight, which reads them, or of the products of two tensors."""
    algebra = walk.algebra
    one, two = states
    assert one is not None
    assert two is not None
    if one.squared or two.squared or (one.leaf and two.leaf):
        return plain(walk)
    for weight, stream, own, across in ((two, one, dims[1], dims[0]), (one, two, dims[0], dims[1])):
        if weight.leaf and len(across) == 1:
            algebra.read(weight.leaf, stream)
            if len(own) == 1:
                algebra.equate(scale)
                return None
            return State(scale, algebra.open({weight.leaf: ()}))
    if one.absorbs or two.absorbs or max(map(len, dims)) > 1:
        return plain(walk)
    for state in (one, two):
        algebra.settle(state, "turned" if algebra.kind == "turned" else "zero")
    return State(scale)


def convolution(walk: Walk) -> State | None:
    """x (N, Ci, *), weight (Co, Ci, *K)."""
    walk.same()
    x, weight, bias = (walk.operand(name) for name in ("input", "weight", "bias"))
    made, read = (False, False)
    if streams(weight):
        dims = walk.grown(*walk.pair("weight"))
        made, read = 0 in dims, 1 in dims
    ours = weight is not None and weight.leaf and walk.new.args["groups"] == 1 and not walk.new.args["transposed"]
    if not ours or streams(x) != read:
        return plain(walk)
    scale = sum((state.scale for state in (x, weight) if state is not None), ONE)
    out: State | None = State(scale)
    if read:
        assert x is not None
        assert weight is not None
        if walk.channels(*walk.pair("input")) != 1 or x.squared:
            return plain(walk)
        walk.algebra.read(weight.leaf, x)
    if made:
        assert weight is not None
        out = State(scale, walk.algebra.open({weight.leaf: ()}))
        if walk.pair("bias")[1] is not None:
            if bias is None:
                raise Stuck("adds one number to all of them")
            out = total(walk, out, bias, times=1)
    else:
        walk.unchanged([out, bias], "it")
        out = None
    return out


def embedding(walk: Walk) -> Results:
    """weight (V, D), indices (*) -> (*, D)."""
    weight = walk.operand("weight")
    walk.same()
    if not streams(weight) or walk.grown(*walk.pair("weight")) != [1]:
        plain(walk)
    return [weight, *[None] * (len(walk.new.outs) - 1)]
