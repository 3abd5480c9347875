"""Width: a layer gets more output channels, and so does everything that shares them; all that reads them cancels the new ones.

Which tensors that are is found by running the model's structure once (see `fastmorph.graph`). The child is of the parent's
own class: its tensors and the sizes that its modules keep are changed, its code is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import ClassVar, Unpack, cast

import torch

from fastmorph.errors import MorphError
from fastmorph.graph.attributes import new_factors, update_attributes
from fastmorph.graph.find import how_to_bake, tensor_of
from fastmorph.graph.growth import Growth
from fastmorph.graph.heads import outputs_by_head
from fastmorph.graph.structure import Structure
from fastmorph.graph.widths import Stage, Width, find_stages, reach
from fastmorph.morphs.add_heads import OldHeads
from fastmorph.morphs.stream_fill import StreamFilling
from fastmorph.morphs.widen_fill import FILLS, Filling, Marks
from fastmorph.morphs.widen_put import Grown, put_grown
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.order import EVERYTHING
from fastmorph.plan.transaction import Transaction


@dataclass(frozen=True)
class Widen:
    """Give a layer `channels` output channels, as data (the arguments of `widen`).

    The name may be a pattern, for many layers at once, and the number a factor, "x1.5": see `fastmorph.plan.patterns`.

    `fill` says what the new channels begin with: "pair", twins that cancel, "zero", one side zero (the paper's), or
    "duplicate", copies of old channels that share their weight (Net2Wider); see `fastmorph.morphs.widen_fill`. Channels that
    norms read (the residual stream of a transformer) get whole multiples by these; any number by "zero", there the axis fill,
    and by "rotate", the dense one, where no weight is tied; see `fastmorph.morphs.stream_fill`.

    `heads`, for these two fills: heads of all attention that reads the channels grow in proportion, and keep their size, as
    code needs it that divides the width by their number. New ones come in twins, see `fastmorph.morphs.add_heads`.
    """

    layer: str
    channels: int | str
    fill: str = "pair"
    heads: bool = False
    replaces: ClassVar[bool] = True

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Widen the layer of `transaction.model`, in place; see `apply_together`."""
        self.apply_together([self], transaction)

    @staticmethod
    def apply_together(operators: Sequence[Widen], transaction: Transaction) -> None:
        """Widen layers one behind the other: the model is followed once, and checked once where they do not meet.

        Raises MorphError if that cannot be exact, with the module, the cause and, if there is one, the nearest width that
        works. Nothing is changed then.
        """
        began = perf_counter()
        for operator in operators:
            if operator.fill not in (*FILLS, "rotate"):
                known = ", ".join(map(repr, (*FILLS, "rotate")))
                raise MorphError(f"layer {operator.layer!r}: fill={operator.fill!r} must be one of {known}.")
            if operator.heads and operator.fill not in _WAYS:
                raise MorphError(
                    f"layer {operator.layer!r}: heads=True takes fill='zero' or 'rotate'; whole multiples need none."
                )
        widths = [operator._width(partial(operator._check, transaction)) for operator in operators]
        taped = any(operator.fill in _WAYS for operator in operators)
        stages, structure = find_stages(transaction.followed(taped=taped), widths)
        share = 1e3 * (perf_counter() - began) / len(operators)
        left = iter(operators)
        for stage in stages:
            _grow(stage, [next(left) for _ in stage.growths], transaction, share)
        transaction.structure = structure

    def reach(self, structure: Structure) -> frozenset[str]:
        """The modules whose tensors change; see `fastmorph.plan.order`."""
        return reach(structure, self._width(lambda growth: None)) if isinstance(self.channels, int) else EVERYTHING

    def _width(self, accept: Callable[[Growth], None]) -> Width:
        return Width(self.layer, cast(int, self.channels), accept, _WAYS.get(self.fill, ""), self.heads)

    def _check(self, transaction: Transaction, growth: Growth) -> None:
        # A stream changes its norms, too.
        transaction.check_reach(
            self, EVERYTHING if growth.stream is not None else {name.rpartition(".")[0] for name in growth.names}
        )
        record = growth.coupling.record
        standardised = growth.atoms[record.mask("standardised")[growth.atoms]]
        if len(standardised) and self.fill != "pair":
            name = record.axis_of(int(standardised[0])).name
            raise MorphError(
                f"layer {self.layer!r}: {name!r} is standardised row by row, which twins alone leave as it is; use fill='pair'."
            )
        if not growth.known and self.fill == "duplicate":
            raise MorphError(
                f"layer {self.layer!r}: the model shuffles its channels, and some new ones take ways that no old one takes, so "
                "that they have none to duplicate; use fill='pair' or 'zero'."
            )


def _grow(stage: Stage, operators: Sequence[Widen], transaction: Transaction, share: float) -> None:
    """Put grown tensors in the place of old ones: each once, when the last operator that it grows by has its turn."""
    whole = stage.growth
    if whole is not None and transaction.with_weights:
        transaction.settle()
    marks = Marks(whole.coupling.record) if whole is not None and transaction.with_weights else None
    grown = None if whole is None else Grown(transaction, whole)
    fillings: dict[str, list[Filling]] = {name: [] for name in ([] if whole is None else whole.names)}
    last = {name: at for at, growth in enumerate(stage.growths) if growth is not None for name in growth.names}
    steps = []
    for at, (operator, growth) in enumerate(zip(operators, stage.growths, strict=True)):
        with transaction.step(operator) as step:
            step.milliseconds += share
            steps.append(step)
            if grown is None or growth is None:
                continue
            if growth.stream is not None:
                _grow_stream(operator, growth, transaction)
                _grow_heads(operator, stage.heads, transaction)
            elif marks is not None:
                filling = Filling(growth, operator.fill, transaction.noise("widen", operator.layer), marks)
                for name in growth.names:
                    fillings[name].append(filling)
            for name in growth.names if growth.stream is None else ():
                if last[name] == at:
                    grown.put(name, fillings.pop(name))
    began = perf_counter()
    if grown is not None:
        grown.flush()
    share = 1e3 * (perf_counter() - began) / len(steps)
    for step in steps:
        step.milliseconds += share
        step.after = transaction.kernel_shapes(step.layer)
    if whole is not None and grown is not None:
        grown.finish()
        buffers = dict(transaction.model.named_buffers())
        for name, value in new_factors(buffers, whole).items():
            transaction.replace(buffers[name], value, linear=None, square=None)
        update_attributes(transaction.model, whole)


@torch.no_grad()
def _grow_stream(operator: Widen, growth: Growth, transaction: Transaction) -> None:
    """The same for a stream."""
    model, record = transaction.model, growth.coupling.record
    growth = growth.streamed
    assert growth.stream is not None
    for direction, _, _ in record.normed:
        if any(axis in growth.layouts for axis in record.parameter(direction)):
            raise MorphError(
                f"layer {operator.layer!r} cannot get more channels: a stream does not grow through {direction!r}, the "
                f"direction of a weight norm; {how_to_bake(model, direction)}."
            )
    gains = {name: tensor_of(model, name) for name in sorted(StreamFilling.gains(growth))}
    filling = StreamFilling(operator.layer, growth, transaction.noise("widen", operator.layer), gains)
    for name in growth.names:
        old = tensor_of(model, name)
        shape = growth.shape(name, old.shape)
        if not transaction.with_weights:
            transaction.replace(old, old.detach().new_empty(shape), linear=None, square=None)
            continue
        new = transaction.compute(old, shape, partial(filling.tensor, name, old))
        linear, square = filling.moments(name)
        transaction.replace(old, new, linear=linear, square=square)
    if growth.stream.outputs:
        transaction.readings.append(filling.reading())


def _grow_heads(operator: Widen, heads: Sequence[Growth], transaction: Transaction) -> None:
    """The same for heads that grow beside it."""
    if not heads:
        return
    marks = Marks(heads[0].coupling.record)
    for growth in heads:
        noise = transaction.noise("add_heads", next(iter(growth.names)))
        put_grown(transaction, growth, [Filling(growth, "pair", noise, marks, share=True)])
    places = outputs_by_head(Growth.of_parts(heads))
    if places:
        transaction.readings.append(OldHeads(places))


def widen(
    model: M,
    channels: Mapping[str, int | str],
    *,
    fill: str = "pair",
    heads: bool = False,
    **options: Unpack[Options],
) -> M:
    """Give layers more output channels, and all that reads them as many inputs, so that the network computes the same.

    Args:
        model: the parent; it is not touched.
        channels: {layer: number of output channels, or a factor such as "x1.5"}, in the order in which they are widened; a name
            may be a pattern, "layer1.*.conv1".
        fill: how new channels cancel in what reads them, see `Widen`.
        heads: whether heads of attention that reads them grow in proportion, see `Widen`.
        **options: those of `morph`, see `Options`; channels are followed on `example_inputs`, guessed where there are none.

    Raises:
        MorphError: a layer cannot be widened exactly, with the cause and the remedy.
    """
    return grow(model, [Widen(layer, number, fill, heads) for layer, number in channels.items()], options)


_WAYS = {"zero": "axis", "rotate": "turned"}  # of a stream that norms read, by the fill

register_operator(Widen, name="widen")
