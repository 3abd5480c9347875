"""What can grow in a network, and by which steps: a table to read before a plan is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, overload

from torch import nn
from tqdm.auto import tqdm

from fastmorph.context import plain_context
from fastmorph.errors import MorphError
from fastmorph.graph.coupled import Coupled
from fastmorph.graph.propose import Found, Proposals
from fastmorph.graph.structure import Structure, follow
from fastmorph.plan.layer_types import find_rule
from fastmorph.plan.layers import find_layer
from fastmorph.plan.watch import Surroundings


@dataclass(frozen=True)
class Candidate:
    """One layer, and what can be done with it.

    Attributes:
        layer: its name.
        kind: its class and kernel size.
        channels: how many output channels it has.
        operators: of "deepen", "insert_subnet", "grow_kernel" and "widen", those that it takes.
        step: the fewest channels found that `widen` gives it; 0: none.
        coupled: the other layers that get as many channels with it.
        cost: by how many entries all parameters and buffers grow at such a step.
        refused: why the other operators are none, a sentence each.
    """

    layer: str
    kind: str
    channels: int
    operators: tuple[str, ...]
    step: int
    coupled: tuple[str, ...]
    cost: int
    refused: tuple[str, ...]


class Candidates(Sequence[Candidate]):
    """The layers of a network; prints as a table, with the refusals below it."""

    def __init__(self, found: Sequence[Candidate]) -> None:
        self._found = tuple(found)

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Candidate]: ...
    def __getitem__(self, place: int | slice) -> Candidate | Sequence[Candidate]:
        return self._found[place]

    def __len__(self) -> int:
        return len(self._found)

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [
            ("layer", "kind", "channels", "deepen", "subnet", "kernel", "widen by", "coupled with", "entries a step")
        ]
        for row in self._found:
            takes = ["yes" if name in row.operators else "-" for name in ("deepen", "insert_subnet", "grow_kernel")]
            more = f" and {len(row.coupled) - 1} more" if len(row.coupled) > 1 else ""
            width = (
                (str(row.step), f"{row.coupled[0]}{more}" if row.coupled else "-", f"{row.cost:,}") if row.step else ("-",) * 3
            )
            cells.append((row.layer, row.kind, str(row.channels), *takes, *width))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, *dict.fromkeys(reason for row in self._found for reason in row.refused)])


@plain_context()
def candidates(
    model: nn.Module, example_inputs: Any = None, *, structure: Structure | None = None, progress: bool = False
) -> Candidates:
    """What can grow in a network: each layer with its operators, the steps of its width, what is coupled with it, the cost.

    A width is tried on the network's structure, once for layers of the same channels, as `widen` does: what the table names
    works. Deepening and subnets are checked for what the layer is and what reads its weight, kernels for convolutions.

    Args:
        model: the network; it is not touched.
        example_inputs: one call's arguments, as `morph` takes them; None: guessed from the first layer.
        structure: what `follow` found in the model, instead of following it again.
        progress: show a progress bar.

    Raises:
        MorphError: the model does not run, or the structure is not its.
    """
    if structure is None:
        structure = follow(model, example_inputs)
    else:
        structure.check(model)
    around = Surroundings(model, structure.inputs)
    groups = {_layer(name): group for name, group in structure.groups().items()}
    names = {name: module for name, module in model.named_modules() if find_rule(module)[0] is not None}
    widths = _Widths(structure, groups)
    rows = [
        _candidate(model, name, names.get(name), groups.get(name), around, widths)
        for name in tqdm(dict.fromkeys([*names, *groups]), desc="candidates", unit="layer", disable=not progress)
    ]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return Candidates(sorted(rows, key=lambda row: order.get(row.layer, order.get(row.layer.rpartition(".")[0], 0))))


def _candidate(
    model: nn.Module, name: str, module: nn.Module | None, group: Coupled | None, around: Surroundings, widths: _Widths
) -> Candidate:
    operators, refused = [], []
    kind, channels = "parameter", 0 if group is None else group.channels
    if module is not None:
        try:
            layer = find_layer(model, name, transposed=True)
            around.check(model, layer)
        except MorphError as error:
            refused.append(str(error))
        else:
            operators += [] if layer.rule.transposed else ["deepen", "insert_subnet"]
            operators += ["grow_kernel"] if layer.dims else []
    elif name in dict(model.named_modules()):
        module = model.get_submodule(name)
    if module is not None:
        size = getattr(module, "kernel_size", ())
        kind = " ".join(filter(None, [type(module).__name__, "x".join(map(str, size)) if isinstance(size, tuple) else ""]))
        channels = channels or getattr(module, "out_channels", 0) or getattr(module, "out_features", 0)
    found = None if group is None else widths.smallest(name)
    if isinstance(found, Found):
        operators.append("widen")
        step, cost = widths.size(found, name)
        return Candidate(name, kind, channels, tuple(operators), step, widths.partners(name), cost, tuple(refused))
    if found is not None:
        refused.append(f"layer {name!r} cannot get more channels: {found}.")
    return Candidate(name, kind, channels, tuple(operators), 0, (), 0, tuple(refused))


def _layer(weight: str) -> str:
    """The layer whose weight, or that from which it is computed, has this name."""
    return weight.partition(".parametrizations.weight.")[0].removesuffix(".weight")


class _Widths:
    """The steps of widths, tried once for all layers that share all of their channels."""

    def __init__(self, structure: Structure, groups: dict[str, Coupled]) -> None:
        self._structure, self._groups = structure, groups
        self._found: dict[Any, Found | str] = {}

    def smallest(self, name: str) -> Found | str:
        group = self._groups[name]
        key = (group.rows, group.channels)
        if key not in self._found:
            self._found[key] = Proposals(self._structure, name).smallest(group.step)
        return self._found[key]

    def size(self, found: Found, name: str) -> tuple[int, int]:
        """By how many channels the layer grows, and by how many entries all parameters do."""
        growth, record = found.growth, self._structure.record
        shapes = {name: [axis.size for axis in record.parameter(name)] for name in growth.names}
        cost = sum(prod(growth.shape(each, shape)) - prod(shape) for each, shape in shapes.items())
        return len(found.child.channels(name)) - self._groups[name].channels, cost

    def partners(self, name: str) -> tuple[str, ...]:
        """The other layers whose own channels are among these."""
        return tuple(self._makers(name))

    def _makers(self, name: str) -> Iterator[str]:
        for row in self._groups[name].rows:
            layer = _layer(row.name)
            if row.role == "makes" and layer != name and layer in self._groups:
                yield layer
