"""What a residual block adds to its stream, found by reading one run backwards from what it returns.

A block is residual if what it returns is what it was given plus something, perhaps several times over; views, casts and one
last function that changes nothing when it is applied again (a ReLU) may stand between. Each thing that is added is followed to
the weights that write it: those without which it would be zero.

- matrix: a weight that sums over the channels inside of the block (o_proj, down_proj, a convolution), behind it only what
  leaves zero zero: views, products, scales;
- gain: the gain of a norm behind it, for a norm would blow the rounding of an all but zero input up by 1 / sqrt(eps);
- shift: a bias, or any other parameter that is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastmorph.graph.dataflow import Dataflow, Node, Value

Kind = Literal["matrix", "gain", "shift"]

# Operators that leave values where they are, or move them.
MOVES = frozenset(
    {
        *(
            "view",
            "_unsafe_view",
            "reshape",
            "_reshape_alias",
            "alias",
            "detach",
            "clone",
            "contiguous",
            "lift_fresh",
            "_to_copy",
        ),
        *("transpose", "t", "permute", "movedim", "numpy_T", "mT", "expand", "squeeze", "unsqueeze", "flatten", "unflatten"),
        *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "roll", "flip", "as_strided"),
        *("index", "index_select", "gather", "constant_pad_nd", "unfold", "im2col", "dropout", "native_dropout"),
    }
)
AGAIN = frozenset({"relu", "clamp", "clamp_min", "clamp_max", "hardtanh"})  # applied twice they are what they are once
_ZERO = AGAIN | {"gelu", "silu", "tanh", "hardswish", "mish", "leaky_relu", "elu", "selu", "sin", "neg", "abs"}  # f(0) = 0
_SUMS = frozenset({"add", "sub", "rsub"})
_NORMS = frozenset(
    {
        *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm", "_native_batch_norm_legit"),
        *("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm_with_update", "_batch_norm_no_update"),
    }
)
_ROOTS = frozenset({"rsqrt", "sqrt", "reciprocal", "pow", "std", "var", "linalg_vector_norm", "norm", "var_mean", "div"})
PRODUCTS = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}
PRODUCTS |= {"linear": ("input", "weight"), "_grouped_mm": ("self", "mat2"), "mv": ("self", "vec")}
PRODUCTS |= {"convolution": ("input", "weight"), "_convolution": ("input", "weight")}
ATTENTION = "_scaled_dot_product"


class Stuck(Exception):
    """The block adds nothing that could be zero: a clause."""


@dataclass(frozen=True)
class Writer:
    """A weight that writes the stream.

    Attributes:
        name: the parameter.
        kind: see the module's text.
        node: the product, of a matrix.
        offset: what code adds to a gain before it multiplies (Gemma's 1 + w).
    """

    name: str
    kind: Kind
    node: Node | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Block:
    """What a residual block does with its stream.

    Attributes:
        stream: which of the tensors that the block was given is the stream.
        ends: the functions behind its last sum, the last first.
        writers: the weights that write it.
    """

    stream: int
    ends: tuple[tuple[str, tuple[Any, ...]], ...]
    writers: tuple[Writer, ...]


def ends(flow: Dataflow, value: Value) -> tuple[tuple[tuple[str, tuple[Any, ...]], ...], Value]:
    """The functions of `AGAIN` that made a value, the last first, and what the first of them was given."""
    found = []
    while (node := flow.node(value)) is not None and node.name in MOVES | AGAIN:
        if node.name in AGAIN:
            found.append((node.name, node.call.numbers))
        value = node.values()[0]
    return tuple(found), value


def find_writers(flow: Dataflow, block: str) -> Block:
    """What the block writes. Raises Stuck if it is no residual block, or adds what cannot be made zero."""
    visit = flow.visits[block][0]
    given = {value.key for value in visit.inputs}
    after, value = ends(flow, visit.outputs[0])
    reaching: dict[tuple[int, int], bool] = {}
    found: dict[str, Writer] = {}
    walk = _Branches(flow, block, given)
    while value.key not in given:
        node = flow.node(value)
        if node is not None and node.name in MOVES:
            value = node.values()[0]
            continue
        sides = node.values() if node is not None and node.name in _SUMS else []
        reach = [side for side in sides if _reaches(flow, side, given, reaching)]
        if node is None or len(reach) != 1 or len(sides) != 2:
            raise Stuck(_cause(flow, node, block))
        (value,) = reach
        for writer in walk.writers(next(side for side in sides if side is not value)):
            if found.setdefault(writer.name, writer) != writer:
                raise Stuck(f"{writer.name!r} writes the stream twice")
    stream = next(place for place, each in enumerate(visit.inputs) if each.key == value.key)
    return Block(stream, after, tuple(found.values()))


def _reaches(flow: Dataflow, value: Value, given: set[tuple[int, int]], known: dict[tuple[int, int], bool]) -> bool:
    """Whether a value is the stream: what the block was given, plus something."""
    if value.key not in known:
        node = flow.node(value)
        known[value.key] = value.key in given or (
            node is not None
            and node.name in MOVES | _SUMS
            and any(_reaches(flow, side, given, known) for side in (node.values() if node.name in _SUMS else node.values()[:1]))
        )
    return known[value.key]


def _cause(flow: Dataflow, node: Node | None, block: str) -> str:
    if node is None:
        return "what it returns is not what it was given plus something"
    module = node.stack[-1]
    place = f"module {module!r}" if module != block else "it"
    if node.name in _NORMS or (module != block and _is_norm(flow, node)):
        return (
            f"it is a post-norm block: {module!r} normalises the stream behind the sum, and to do so once more is not to leave "
            "it as it is (LN(LN(x)) is not LN(x))"
        )
    return f"it is no residual block: {place} applies {node.name} to the stream, which is not to add something to it"


def _is_norm(flow: Dataflow, node: Node) -> bool:
    return node.name == "mul" and any(_normalised(flow, side) for side in node.values())


def _normalised(flow: Dataflow, value: Value) -> bool:
    """Whether a value is a product of something with the root of its own sums."""
    node = _behind(flow, value)
    return node is not None and node.name in ("mul", "div") and any(_is_root(flow, side) for side in node.values()[1:])


def _is_root(flow: Dataflow, value: Value, depth: int = 6) -> bool:
    node = _behind(flow, value)
    if node is None or not depth:
        return False
    if node.name in _ROOTS - {"div"}:
        return True
    return any(_is_root(flow, side, depth - 1) for side in node.values()[:1])


def _behind(flow: Dataflow, value: Value) -> Node | None:
    """What made a value, moves apart."""
    node = flow.node(value)
    while node is not None and node.name in MOVES:
        node = flow.node(node.values()[0])
    return node


class _Branches:
    """Follows what is added to the weights that write it."""

    def __init__(self, flow: Dataflow, block: str, given: set[tuple[int, int]]) -> None:
        self._flow, self._block, self._given = flow, block, given

    def writers(self, value: Value, gain: Writer | None = None) -> list[Writer]:
        """The weights without which a value would be zero; `gain` multiplies it. Raises Stuck."""
        flow = self._flow
        parameter = named(flow, value)
        if parameter is not None:
            return [Writer(parameter[0], "shift")]
        node = flow.node(value)
        if value.key in self._given or node is None or flow.is_torn(value):
            raise Stuck("it adds what it was given in another way")
        name, args = node.name, node.call.args
        if name in _NORMS:
            weight, bias = (self._named(node, key) for key in ("weight", "bias"))
            if weight is None:
                raise Stuck(f"module {node.stack[-1]!r} normalises what it adds, and has no gain that could be zero")
            return [Writer(weight, "gain"), *([Writer(bias, "shift")] if bias is not None else [])]
        if name in PRODUCTS or name.startswith(ATTENTION):
            return self._product(node)
        if name in MOVES or name in _ZERO:
            return self.writers(node.values()[0], gain)
        if name in ("zeros", "zeros_like", "new_zeros"):
            return []
        if name in ("mul", "div"):
            return self._scaled(node, gain)
        if name in ("sum", "mean", "cumsum"):
            return self.writers(node.values()[0], gain)
        if name in (*_SUMS, "cat", "stack", "index_add", "where", "scatter_add", "index_put"):
            numbers = [item for key, item in args.items() if key in ("self", "other") and isinstance(item, int | float)]
            if any(numbers):
                raise Stuck(f"it adds the number {numbers[0]}")
            sides = [side for side in node.values() if side.tensor.is_floating_point()]
            return [writer for side in sides for writer in self.writers(side, gain)]
        raise Stuck(f"what it adds comes out of {name} in module {node.stack[-1]!r}, and no weight of its own makes that zero")

    def _named(self, node: Node, key: str) -> str | None:
        value = node.operand(key)
        found = None if value is None else named(self._flow, value)
        return None if found is None else found[0]

    def _product(self, node: Node) -> list[Writer]:
        if node.name.startswith(ATTENTION):
            value = node.operand("value")
            assert value is not None
            return self.writers(value)
        found: list[Writer] = []
        for key in ("bias", "self") if node.name in ("addmm", "baddbmm") else ("bias",):
            bias = node.operand(key)
            if bias is not None:
                found += self.writers(bias)
        sides = [side for key in PRODUCTS[node.name] if (side := node.operand(key)) is not None]
        weights = [name for side in sides if (name := named(self._flow, side)) is not None]
        if weights:
            return [Writer(weights[-1][0], "matrix", node), *found]
        return [*self.writers(sides[-1]), *found]  # attention and what it reads: no bias makes these zero

    def _scaled(self, node: Node, gain: Writer | None) -> list[Writer]:
        """What is added is a product: one factor of zero is enough."""
        sides = node.values()
        for side in sides:
            found = named(self._flow, side)
            if found is not None and len(sides) == 2:
                other = next(each for each in sides if each is not side)
                return self.writers(other, Writer(found[0], "gain", None, found[1]))
        if _normalises(self._flow, node):
            if gain is None:
                raise Stuck(f"module {node.stack[-1]!r} normalises what it adds, and has no gain that could be zero")
            return [gain]
        causes = []
        for side in sides[: 1 if node.name == "div" else None]:
            try:
                return self.writers(side, gain)
            except Stuck as stuck:
                causes.append(stuck)
        raise causes[0]


def _normalises(flow: Dataflow, node: Node) -> bool:
    """Whether a product of two computed things divides the one by the root of its own sums."""
    return any(_is_root(flow, side) for side in node.values()[1:])


def named(flow: Dataflow, value: Value) -> tuple[str, float] | None:
    """The parameter that a value is, moved and cast, and a number that was added to it; None if it is none."""
    offset = 0.0
    while (name := flow.name(value)) is None:
        node = flow.node(value)
        if node is None or node.name not in MOVES | {"add"} or len(node.values()) != 1:
            return None
        if node.name == "add":
            offset += next(
                item for key, item in node.call.args.items() if key in ("self", "other") and not isinstance(item, Tensor)
            )
        value = node.values()[0]
    return name, offset
