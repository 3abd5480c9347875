"""Heads: attention gets more of them, of the size they have, and its output projection cancels the new ones.

Which rows, columns and numbers belong to a head is found by following the model (see `fastmorph.graph.heads`). A head's size,
and with it rotary positions, norms over a head and the scale 1 / sqrt(head size), stay as they are, and so does the width that
attention reads and writes. New heads come in twins: the same rows of noise for queries, keys and values, so that both compute
the same, and opposite columns of the output projection. One that is left over is a copy of an old head, and the two share that
one's columns W as W / 2 + R and W / 2 - R.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from fastmorph.errors import MorphError
from fastmorph.graph.attributes import update_attributes
from fastmorph.graph.growth import Growth
from fastmorph.graph.heads import Heads, by_heads, find_heads, outputs_by_head, try_heads
from fastmorph.graph.propose import Refusal
from fastmorph.graph.record import Ints
from fastmorph.graph.structure import Structure
from fastmorph.morphs.widen_fill import FILLS, Filling, Marks
from fastmorph.morphs.widen_put import put_grown
from fastmorph.outputs import Outputs, Path
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction


@dataclass(frozen=True)
class AddHeads:
    """Give a module of attention `heads` query heads, and `kv_heads` heads of keys and values, as data (see `add_heads`).

    Attributes:
        layer: dotted name of the module of attention, or of the layer that makes its queries.
        heads: how many query heads it is to have, those that it has included.
        kv_heads: how many heads of keys and values; None: as many query heads share each as now.
        fill: what new heads begin with: "pair", twins that cancel, "zero", columns (or rows) of zeros, or "duplicate", copies
            of old heads that share their columns (Net2Wider); see `fastmorph.morphs.widen_fill`.

    Where a forward adds to the scores of several modules what it looks up by head in one table (T5), these all get the heads.
    """

    layer: str
    heads: int
    kv_heads: int | None = None
    fill: str = "pair"

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Add the heads to `transaction.model`, in place; see `apply_together`."""
        self.apply_together([self], transaction)

    @staticmethod
    def apply_together(operators: Sequence[AddHeads], transaction: Transaction) -> None:
        """Add heads to several modules: the model is followed once, and checked once where they share nothing.

        Raises MorphError if that cannot be exact, with the layer, the cause and the remedy.
        """
        began = perf_counter()
        for operator in operators:
            operator._check()
        structure = by_heads(transaction.followed(), [operator.layer for operator in operators])
        share = 1e3 * (perf_counter() - began) / len(operators)
        done, most = 0, len(operators)
        while done < len(operators):
            batch = _apart(structure, operators[done : done + most])
            rounds = _rounds(structure, batch)
            if isinstance(rounds, Refusal):
                if len(batch) == 1:
                    raise MorphError(
                        f"layer {batch[0].layer!r} cannot get more heads: {rounds.cause}; let that module take its sizes from "
                        "its tensors, or add heads in one plan to all modules that share something with this one's."
                    )
                most = 1
                continue
            _write(transaction, batch, rounds, share)
            structure = rounds[-1].child if rounds else structure
            done += len(batch)
        transaction.structure = None

    def _check(self) -> None:
        if self.fill not in FILLS:
            known = ", ".join(map(repr, FILLS))
            raise MorphError(f"layer {self.layer!r}: fill={self.fill!r} must be one of {known}.")
        for name, number in (("heads", self.heads), ("kv_heads", self.kv_heads)):
            if isinstance(number, bool) or not isinstance(number, int | None) or (number is None and name == "heads"):
                raise MorphError(f"layer {self.layer!r}: {name}={number!r} must be an int.")

    def _totals(self, now: Heads) -> tuple[int, int]:
        """How many heads there are to be, and how many of keys and values."""
        old, groups = len(now.queries), len(now.groups)
        if self.heads < old or (self.kv_heads is not None and self.kv_heads < groups):
            raise MorphError(
                f"layer {self.layer!r} has {old} heads, and {groups} of keys and values: heads={self.heads}, "
                f"kv_heads={self.kv_heads} must be at least that."
            )
        wanted = self.kv_heads or max(1, self.heads // now.repeats)
        if self.heads % wanted or self.heads // wanted < now.repeats or (self.kv_heads is None and self.heads % now.repeats):
            near = -(-self.heads // now.repeats)
            raise MorphError(
                f"layer {self.layer!r} has {now.repeats} query heads to each head of keys and values, and {self.heads} heads "
                f"over {wanted} would be less, or not equally many; the nearest that works is heads={near * now.repeats}, "
                f"kv_heads={near}, or more query heads to each of the {groups}, heads={-(-self.heads // groups) * groups}, "
                f"kv_heads={groups}."
            )
        return self.heads, wanted

    def _part(self, structure: Structure, *, wide: bool) -> Growth | None:
        """More query heads in every group (`wide`), or more groups as they then are; None if there are enough."""
        now = find_heads(structure, self.layer)
        heads, groups = self._totals(now)
        if wide:
            heads, groups = len(now.groups) * heads // groups, len(now.groups)
        return now.grown(structure, heads, groups) if heads > len(now.queries) else None


@dataclass(frozen=True, eq=False)
class OldHeads:
    """Outputs that hold something of each head are compared on the old ones: a `Reading` of certificates.

    Attributes:
        places: of these outputs, by path, the dimension of heads, and where the old ones stand.
    """

    places: Mapping[Path, tuple[int, Ints]]

    @property
    def told(self) -> str:
        """What a certificate says of it."""
        names = ", ".join(".".join(map(str, path)) or "output" for path in self.places)
        return f"the old heads of {names}, which have more of them"

    def outputs(self, parent: Outputs, child: Outputs) -> Outputs:
        """With old heads alone."""
        return {path: self._old(path, leaf) for path, leaf in child.items()}

    def _old(self, path: Path, leaf: Any) -> Any:
        if path not in self.places or not isinstance(leaf, Tensor):
            return leaf
        dim, places = self.places[path]
        return leaf.index_select(dim, torch.from_numpy(places).to(leaf.device))

    def layer(self, name: str) -> str | None:
        """No layer is new."""
        return name


@dataclass(frozen=True, eq=False)
class _Round:
    """Growths of operators in turn, None for those that need none, what they come to, and the structure then."""

    parts: tuple[Growth | None, ...]
    growth: Growth
    child: Structure


def _apart(structure: Structure, operators: Sequence[AddHeads]) -> list[AddHeads]:
    """The first operators, as many as share no head, or ask the same of the same heads, which one table ties."""
    found: list[AddHeads] = []
    held = np.zeros(0, np.int64)
    asked: dict[bytes, AddHeads] = {}
    for operator in operators:
        groups = find_heads(structure, operator.layer).groups
        wanted = replace(operator, layer="")
        if np.isin(groups, held).any() and asked.get(groups.tobytes()) != wanted:
            break
        found.append(operator)
        asked[groups.tobytes()] = wanted
        held = np.append(held, groups)
    return found


def _rounds(structure: Structure, operators: Sequence[AddHeads]) -> list[_Round] | Refusal:
    """How operators that share no head grow the model, all at once."""
    rounds: list[_Round] = []
    for wide in (True, False):
        parts = tuple(_once(operator._part(structure, wide=wide) for operator in operators))
        growing = [part for part in parts if part is not None]
        if growing:
            found = try_heads(structure, Growth.of_parts(growing))
            if isinstance(found, Refusal):
                return found
            rounds.append(_Round(parts, found.growth, found.child))
            structure = found.child
    return rounds


def _once(parts: Iterable[Growth | None]) -> Iterator[Growth | None]:
    """Growths, None for one that an earlier one is as well."""
    seen: set[bytes] = set()
    for part in parts:
        known = part is not None and part.atoms.tobytes() in seen
        if part is not None:
            seen.add(part.atoms.tobytes())
        yield None if known else part


def _write(transaction: Transaction, operators: Sequence[AddHeads], rounds: Sequence[_Round], share: float) -> None:
    """Put grown tensors in the place of old ones."""
    model = transaction.model
    if rounds and transaction.with_weights:
        transaction.settle()
    marks = [Marks(turn.growth.coupling.record) for turn in rounds]
    for place, operator in enumerate(operators):
        with transaction.step(operator) as step:
            step.milliseconds += share
            for turn, mark in zip(rounds, marks, strict=True):
                part = turn.parts[place]
                if part is not None:
                    noise = transaction.noise("add_heads", operator.layer)
                    put_grown(transaction, part, [Filling(part, operator.fill, noise, mark, share=True)])
    for turn in rounds:
        update_attributes(model, turn.growth)
        places = outputs_by_head(turn.growth)
        if places:
            transaction.readings.append(OldHeads(places))


def add_heads(
    model: M,
    heads: Mapping[str, int],
    *,
    fill: str = "pair",
    **options: Unpack[Options],
) -> M:
    """Give modules of attention more heads of the size that they have, so that the network computes the same.

    Args:
        model: the parent; it is not touched.
        heads: {module of attention, or the layer that makes its queries: number of query heads}. Heads of keys and values come
            along, as many query heads to each as now; `AddHeads` can say otherwise.
        fill: what new heads begin with, see `AddHeads`.
        **options: those of `morph`, see `Options`; heads are followed on `example_inputs`, guessed where there are none.

    Raises:
        MorphError: a module cannot get more heads exactly, with the cause and the remedy.
    """
    return grow(model, [AddHeads(layer, number, fill=fill) for layer, number in heads.items()], options)


register_operator(AddHeads, name="add_heads")
