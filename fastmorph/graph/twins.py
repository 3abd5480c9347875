"""Which channels inside of a block can be made twins: equal whatever the block reads, once some rows of its weights are equal.

The input of a writer (see `fastmorph.graph.residual`) is followed backwards to the weights that make it, and for each of its
channels it is told which row of each of these weights it comes from. What a channel goes through besides, such as the
attention weights of its head or the statistics of its group, is its context: twins share that. Two channels of one context are
twins when their rows are equal, for whatever is elementwise.

Labels are tensors of the real one's shape, of which only the first position of each dimension that no channel stands along
is computed with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmorph.graph.dataflow import Dataflow, Node, Value
from fastmorph.graph.residual import ATTENTION, MOVES, PRODUCTS, Stuck, Writer, named

_NONE = -1  # no row of that weight
_SOFTMAX = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})
_REDUCED = frozenset({"sum", "mean", "var", "std", "amax", "amin", "linalg_vector_norm"})
_COPIES = frozenset({"_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh", "dropout", "native_dropout"})
_NORMED = {
    "native_layer_norm": ("weight", "bias"),
    "native_group_norm": ("weight", "bias"),
    "_fused_rms_norm": ("weight",),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update"),
        ("weight", "bias", "running_mean", "running_var"),
    ),
}


@dataclass(frozen=True)
class Row:
    """A dimension of a parameter or buffer, whose indices make channels."""

    name: str
    dim: int


Key = tuple[Row, int] | str  # a row, and in which of several ways it makes channels; or a context
Labels = dict[Key, Tensor]  # shape of the tensor, which index


@dataclass(frozen=True, eq=False)
class Twins:
    """What makes the channels that a writer reads cancel.

    Attributes:
        name: the writer's weight.
        dim: the dimension that it sums over.
        columns: (index, of which, factor): the entries that it gets along it.
        rows: (Row, one, other): what is to be equal.
    """

    name: str
    dim: int
    columns: list[tuple[int, int, float]]
    rows: list[tuple[Row, int, int]]


def find_twins(flow: Dataflow, writer: Writer, given: set[tuple[int, int]]) -> Twins:
    """Pairs among the channels that a writer reads; of an odd number three together, and one that is alone gets zeros.

    Raises Stuck where it is not known which rows make them.
    """
    assert writer.node is not None
    labels, dim = _Labeller(flow, given).read(writer.node)
    columns = {key: label.tolist() for key, label in labels.items()}
    rows = [key for key in columns if isinstance(key, tuple)]
    if not rows:
        raise Stuck(f"no weight makes the channels that {writer.name!r} reads")
    kinds: dict[tuple[object, ...], list[int]] = {}
    for column in range(len(columns[rows[0]])):
        ways = tuple(columns[row][column] != _NONE for row in rows)
        kinds.setdefault((*ways, *(columns[key][column] for key in columns if isinstance(key, str))), []).append(column)
    found = Twins(writer.name, dim, [], [])
    for kind in kinds.values():
        half = len(kind) // 2
        for one, other in zip(kind[:half], kind[half:], strict=False):
            found.columns.append((other, one, -1.0))
        if len(kind) % 2:
            last = kind[-1]
            if half:
                found.columns[-1] = (found.columns[-1][0], kind[half - 1], -0.5)
            found.columns.append((last, kind[half - 1] if half else last, -0.5 if half else 0.0))
    for other, one, _ in found.columns:
        for row in rows:
            if columns[row][one] != columns[row][other]:
                found.rows.append((row[0], columns[row][one], columns[row][other]))
    return found


class _Labeller:
    def __init__(self, flow: Dataflow, given: set[tuple[int, int]]) -> None:
        self._flow, self._given = flow, given
        self._known: dict[tuple[int, int], Labels] = {}

    def read(self, node: Node) -> tuple[Labels, int]:
        """The labels of the channels that a product sums over, (channels,) each, and which dimension of its weight that is."""
        keys = PRODUCTS[node.name]
        sides = [node.operand(key) for key in keys]
        where = max(place for place, side in enumerate(sides) if side is not None and named(self._flow, side) is not None)
        weight, other = sides[where], sides[1 - where]
        assert weight is not None
        assert other is not None
        along = weight_dims(self._flow, weight)
        if "convolution" in node.name:
            if node.call.args["groups"] > 1:
                raise Stuck("its last convolution has groups")
            return _line(self.of(other), other.tensor, 1), along[1]
        contracted = -1 if where else other.tensor.ndim - 2
        labels = _line(self.of(other), other.tensor, contracted)
        inner = weight.tensor.ndim - 2 if where else weight.tensor.ndim - 1
        if node.name == "linear":
            inner = 1
        return labels, along[inner]

    def of(self, value: Value) -> Labels:
        """Of each position of a value, which rows make its channel, and in which contexts. Raises Stuck."""
        if value.key not in self._known:
            self._known[value.key] = {key: label.expand(value.tensor.shape) for key, label in self._find(value).items()}
        return self._known[value.key]

    def _find(self, value: Value) -> Labels:
        flow, shape = self._flow, value.tensor.shape
        node = flow.node(value)
        if node is None or value.key in self._given:
            if isinstance(value.tensor, nn.Parameter) and value.key not in self._given:
                return self._rows(value)
            return {f"{id(value.tensor)}": _leading(value.tensor, 0)} if value.tensor.numel() > 1 else {}
        if flow.is_torn(value):
            raise Stuck(f"module {node.stack[-1]!r} writes into a part of a tensor")
        name = node.name
        if name in PRODUCTS:
            return self._product(node, value.tensor)
        if name.startswith(ATTENTION):
            return self._attention(node, value.tensor)
        if name in _NORMED:
            return self._normed(node, value.tensor)
        if name in MOVES:
            return self._moved(node, value.tensor)
        if name in ("cat", "stack"):
            return self._joined(node)
        if name in _SOFTMAX:
            found = dict(self.of(node.values()[0]))
            last = node.call.args["dim"] % len(shape) == len(shape) - 1
            return found | ({f"{id(node)}": _leading(value.tensor, 1)} if last else {})
        if name in _REDUCED and node.call.args.get("dim") is not None:
            return self._reduced(node, node.values()[0])
        if torch.Tag.pointwise not in node.call.func.tags:
            raise Stuck(f"module {node.stack[-1]!r} applies {name}, which is not elementwise")
        found = {}
        for side in node.values():
            if side.tensor.numel() > 1:
                _add(found, {key: label.expand(shape) for key, label in self.of(side).items()})
        return found

    def _rows(self, value: Value) -> Labels:
        """A parameter's own indices."""
        name, tensor = self._flow.name(value) or "", value.tensor
        return {(Row(name, dim), 0): _range(tensor, dim) for dim in range(tensor.ndim) if tensor.shape[dim] > 1}

    def _product(self, node: Node, out: Tensor) -> Labels:
        """A weight's rows make channels; a product of two computed things mixes positions, alike within one context."""
        flow, keys = self._flow, PRODUCTS[node.name]
        sides = [side for key in keys if (side := node.operand(key)) is not None]
        found: Labels = {}
        weights = [place for place, side in enumerate(sides) if named(flow, side) is not None]
        for key in ("bias", "self") if node.name in ("addmm", "baddbmm") else ("bias",):
            bias = node.operand(key)
            if bias is not None:
                dim = 1 if "convolution" in node.name else out.ndim - 1
                _add(found, {key: _shaped(label, out, dim) for key, label in self.of(bias).items()})
        if not weights:
            if len(sides) != 2 or node.name not in ("bmm", "baddbmm"):
                raise Stuck(f"module {node.stack[-1]!r} applies {node.name} to what it computed")
            _add(found, {key: label[..., :1, :].expand(out.shape) for key, label in self.of(sides[1]).items()})
            return found | {f"{id(node)}": _leading(out, 2)}
        weight, other = sides[weights[-1]], sides[1 - weights[-1]]
        along = weight_dims(flow, weight)
        name, _ = named(flow, weight) or ("", 0)
        if "convolution" in node.name:
            groups, row = node.call.args["groups"], _range(out, 1)
            if node.call.args.get("transposed"):
                raise Stuck(f"module {node.stack[-1]!r} applies a transposed convolution")
            _add(found, {(Row(name, along[0]), 0): row})
            if groups > 1 and groups == other.tensor.shape[1] == out.shape[1]:
                _add(found, {key: _first(label, keep=1).expand(out.shape) for key, label in self.of(other).items()})
            elif groups > 1:
                found[f"{id(node)}"] = row // (out.shape[1] // groups)
            return found
        right = weights[-1] == 1
        dim = weight.tensor.ndim - 1 if right else weight.tensor.ndim - 2
        if node.name == "linear":
            dim = 0
        _add(found, {(Row(name, along[dim]), 0): _range(out, out.ndim - 1 if right else out.ndim - 2)})
        return found

    def _attention(self, node: Node, out: Tensor) -> Labels:
        value = node.operand("value")
        assert value is not None
        repeats = out.shape[-3] // value.tensor.shape[-3]
        labels = {key: label[..., :1, :].repeat_interleave(repeats, -3) for key, label in self.of(value).items()}
        found = {key: label.expand(out.shape) for key, label in labels.items()}
        return found | {f"{id(node)}": _leading(out, 2)}

    def _normed(self, node: Node, out: Tensor) -> Labels:
        given = node.values()[0]
        found = dict(self.of(given))
        dim = out.ndim - 1 if node.name in ("native_layer_norm", "_fused_rms_norm") else 1
        for key in _NORMED[node.name]:
            weight = node.operand(key)
            if weight is not None and weight.tensor.ndim > 1:
                raise Stuck(f"module {node.stack[-1]!r} normalises several dimensions")
            if weight is not None:
                rows = self._rows(weight) if self._flow.name(weight) else self.of(weight)
                _add(found, {key: _shaped(label, out, dim) for key, label in rows.items()})
        if node.name == "native_group_norm":
            found[f"{id(node)}"] = _range(out, 1) // (out.shape[1] // node.call.args["group"])
        return found

    def _moved(self, node: Node, out: Tensor) -> Labels:
        """A move, made with the labels themselves."""
        given = node.values()[0]
        if node.name in _COPIES:
            return self.of(given)
        if len(node.values()) > 1:
            raise Stuck(f"module {node.stack[-1]!r} moves channels by {node.name}")
        place = next(place for place, tensor in enumerate(node.call.outputs) if tensor is out)
        found: Labels = {}
        for key, label in self.of(given).items():
            moved = node.call.on(label.contiguous() - _NONE)  # where a pad puts a zero, there is none
            found[key] = (moved[place] if isinstance(moved, list | tuple) else moved) + _NONE
        return found

    def _joined(self, node: Node) -> Labels:
        sides, dim = node.values(), node.call.args["dim"]
        labels = [self.of(side) for side in sides]
        keys = dict.fromkeys(key for each in labels for key in each)
        join = torch.cat if node.name == "cat" else torch.stack
        return {
            key: join(
                [each.get(key, torch.full(side.tensor.shape, _NONE)) for each, side in zip(labels, sides, strict=True)], dim
            )
            for key in keys
        }

    def _reduced(self, node: Node, given: Value) -> Labels:
        """A sum over a dimension: what stands along others keeps its rows; the sum is alike for all that had a part in it."""
        dims, keeps = node.call.args["dim"], node.call.args.get("keepdim", False)
        found: Labels = {}
        for key, label in self.of(given).items():
            over = {dim % label.ndim for dim in (dims if isinstance(dims, list | tuple) else [dims])}
            varies = any((label.narrow(dim, 0, 1) != label).any() for dim in over)
            for dim in sorted(over, reverse=True):
                label = label.narrow(dim, 0, 1) if keeps else label.select(dim, 0)
            found[f"{id(node)} {key}" if varies else key] = label
        return found


def weight_dims(flow: Dataflow, value: Value) -> list[int]:
    """Of each dimension of a weight, moved as it is, the parameter's own."""
    moves = []
    while flow.name(value) is None:
        node = flow.node(value)
        assert node is not None
        moves.append(node)
        value = node.values()[0]
    dims = torch.empty(value.tensor.shape, device="meta")
    labels = [_range(dims, dim) for dim in range(dims.ndim)]
    for node in reversed(moves):
        if node.name in ("_to_copy", "clone", "contiguous", "detach", "alias"):
            continue
        if node.name not in ("t", "transpose", "permute", "mT", "numpy_T", "view", "unsqueeze", "expand", "_unsafe_view"):
            raise Stuck(f"a weight is read by {node.name}")
        labels = [node.call.on(label.contiguous()) for label in labels]
    found = []
    for dim in range(labels[0].ndim):
        varying = [own for own, label in enumerate(labels) if (label.narrow(dim, 0, 1) != label).any()]
        if len(varying) > 1:
            raise Stuck("a weight is read with two of its dimensions as one")
        found.append(varying[0] if varying else -1)
    return found


def _add(found: Labels, more: Labels) -> None:
    """Both labels: a channel may come from several rows of one weight."""
    for key, label in more.items():
        if isinstance(key, tuple):
            row, ways = key[0], 0
            while (row, ways) in found and not torch.equal(found[row, ways], label):
                ways += 1
            found[row, ways] = label
        else:
            found[f"{key} {len(found)}" if key in found and not torch.equal(found[key], label) else key] = label


def _range(like: Tensor, dim: int) -> Tensor:
    shape = [size if other == dim else 1 for other, size in enumerate(like.shape)]
    return torch.arange(like.shape[dim]).view(shape).expand(like.shape)


def _shaped(label: Tensor, like: Tensor, dim: int) -> Tensor:
    return label.view([-1 if other == dim else 1 for other in range(like.ndim)]).expand(like.shape)


def _leading(like: Tensor, inner: int) -> Tensor:
    """The index over all dimensions but the last few."""
    shape = like.shape[: like.ndim - inner]
    return torch.arange(shape.numel()).view(*shape, *[1] * inner).expand(like.shape)


def _first(label: Tensor, keep: int) -> Tensor:
    for dim in range(label.ndim):
        if dim != keep:
            label = label.narrow(dim, 0, 1)
    return label


def _line(labels: Labels, like: Tensor, dim: int) -> Labels:
    """The labels along a dimension, at the first position of the others."""
    return {key: _first(label, dim % like.ndim).reshape(-1) for key, label in labels.items()}


def rows_of(twins: Iterable[Twins]) -> dict[Row, list[tuple[int, int]]]:
    """For each dimension of a tensor (index, of which): whose entries it takes, so that all that are to be equal are."""
    parent: dict[tuple[Row, int], tuple[Row, int]] = {}

    def root(item: tuple[Row, int]) -> tuple[Row, int]:
        while item in parent:
            item = parent[item]
        return item

    for each in twins:
        for row, one, other in each.rows:
            first, second = sorted((root((row, one)), root((row, other))), key=lambda item: item[1])
            if first != second:
                parent[second] = first
    found: dict[Row, list[tuple[int, int]]] = {}
    for item in parent:
        found.setdefault(item[0], []).append((item[1], root(item)[1]))
    return found
