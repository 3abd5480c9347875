"""The ways in which a layer could get so many more channels, and the first of them that the model can follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from fastmorph.errors import MorphError
from fastmorph.graph.attributes import update_attributes
from fastmorph.graph.coupling import Coupling
from fastmorph.graph.growth import Growth
from fastmorph.graph.record import Ints, Record
from fastmorph.graph.shuffle import TOO_FEW, placed, proportional
from fastmorph.graph.skeleton import ForwardError, Skeleton

# Convolutions in groups get wider groups if they can; norms in groups only get more of them.
_WAYS: tuple[frozenset[str], ...] = (frozenset({"groups"}), frozenset())
_RETRIES = 8
_KINDS = 4  # kinds of channels that are tried alone
_DISTANCE = 8  # how far from the width asked for one is searched that a shuffle allows


@dataclass(frozen=True)
class Refusal:
    """Why one way is none: a clause, a width near the one asked for that this way might give, and what else helps."""

    cause: str
    near: int | None = None
    remedy: str = "widen another layer"


class Proposals:
    """The ways to widen one set of channels.

    Args:
        skeleton: the model's structure; it is left as it is.
        record: what a run of it found.
        atoms: the channels, (n,).
        inputs: of that run.
    """

    def __init__(self, skeleton: Skeleton, record: Record, atoms: Tensor, inputs: tuple[Any, ...]) -> None:
        self._skeleton, self._record, self._atoms, self._inputs = skeleton, record, atoms, inputs
        grouped = any(choice.attribute == "groups" for choice in record.choices)
        self._standardised = record.standardised.numpy()
        self._couplings = [Coupling(record, wider) for wider in (_WAYS if grouped else _WAYS[:1])]

    def find(self, width: int) -> Growth | list[Refusal]:
        """A growth to `width` channels after which the model still does the same; else why there is none."""
        refusals = []
        for proposal in chain(self._copies(width), self._shuffled(width), self._even(width)):
            found = proposal
            if isinstance(found, Growth):
                found = self._tried(found)
                if isinstance(found, Growth):
                    return found
            refusals.append(found)
        return refusals

    def nearest(self, width: int, refusals: list[Refusal]) -> tuple[int, str] | None:
        """A width near this one that works, and why this one does not."""
        causes = {refusal.near: refusal.cause for refusal in reversed(refusals) if refusal.near is not None}
        for near in sorted(causes, key=lambda near: abs(near - width)):
            if isinstance(self.find(near), Growth):
                return near, causes[near]
        if all(refusal.cause != TOO_FEW for refusal in refusals):
            return None
        for near in sorted(range(width - _DISTANCE, width + _DISTANCE + 1), key=lambda near: abs(near - width)):
            if near > len(self._atoms) and any(isinstance(found, Growth) for found in self._shuffled(near)):
                return near, TOO_FEW
        return None

    def _tried(self, growth: Growth) -> Growth | Refusal:
        """The growth, with modules to be cautious about, if the model can follow."""
        try:
            found = growth.difference(self._grown(growth))
        except MorphError as error:
            return Refusal(str(error))
        except ForwardError as error:
            inner = self._with_inner(growth, error.module)
            if inner is not None:
                return self._tried(inner)
            if growth.numbers and error.module not in growth.cautious and len(growth.cautious) < _RETRIES:
                return self._tried(replace(growth, cautious=growth.cautious | {error.module}))
            return Refusal(str(error), remedy="let that module take its sizes from its tensors, or widen another layer")
        if found is None:
            return growth
        if growth.numbers and found.module is not None and found.module not in growth.plain:
            return self._tried(replace(growth, plain=growth.plain | self._like(found.module)))
        return Refusal(found.cause)

    def _like(self, module: str) -> frozenset[str]:
        """The names of all modules of this one's class."""
        kind = type(self._skeleton.model.get_submodule(module))
        return frozenset(name for name, other in self._skeleton.model.named_modules() if type(other) is kind)

    def _with_inner(self, growth: Growth, module: str) -> Growth | None:
        """With as many of all that is made inside modules like this one: attention may want to be as wide as its input."""
        if not (growth.even and growth.numbers):
            return None
        coupling = growth.coupling
        inside = tuple(f"{name}." for name in self._like(module) if name)
        made = [coupling.of(atoms) for name, atoms in self._record.outputs.items() if name.startswith(inside)]
        classes = [
            cls for cls in np.unique(np.concatenate([*made, np.zeros(0, np.int64)])).tolist() if cls not in coupling.causes
        ]
        added = np.isin(coupling.classes, classes) & (growth.copies == 0)
        return replace(growth, copies=np.where(added, growth.copies.max(), growth.copies)) if added.any() else None

    def _grown(self, growth: Growth) -> Record:
        """What a run of the grown model finds."""
        skeleton = self._skeleton.copy()
        for name, shape in growth.shapes().items():
            skeleton.resize(name, shape)
        update_attributes(skeleton.model, growth)
        return skeleton.trace(self._inputs, train=self._record.trained)

    def _copies(self, width: int) -> Iterator[Growth | Refusal]:
        """Copies of the last channel, of the last of each kind, of those and of what is cut like them, or far apart."""
        old = len(self._atoms)
        for coupling in self._couplings:
            sequence = coupling.of(self._atoms)
            free = [cls for cls in dict.fromkeys(sequence.tolist()) if cls not in coupling.causes]
            if not free:
                yield Refusal(coupling.causes[int(sequence[-1])])
                continue
            held = {cls: module for module, together in coupling.normalised for cls in together.tolist()}
            if free[-1] in held:
                yield Refusal(f"{held[free[-1]]!r} normalises over them")
                continue
            families = _families(coupling, sequence, [cls for cls in free if cls not in held])
            others = [{cls: 1} for cls in list(families)[-_KINDS - 1 : -1]]
            tried: list[dict[int, int]] = []
            spread = dict.fromkeys(free[:: -max(1, len(free) // (width - old))], 1)
            for copies in ({free[-1]: 1}, families, _with_partners(coupling, families), *others, spread):
                if copies in tried:
                    continue
                tried.append(copies)
                if any(self._standardised[coupling.members(cls)].any() for cls in copies):  # twins alone leave a row's mean
                    copies = {cls: 2 * count for cls, count in copies.items()}
                step = sum(count * int((sequence == cls).sum()) for cls, count in copies.items())
                if (width - old) % step:
                    yield Refusal(f"they come in steps of {step}", old + max(1, round((width - old) / step)) * step)
                    continue
                growth = Growth.of_classes(coupling, {cls: count * (width - old) // step for cls, count in copies.items()})
                yield from _orders(growth)

    def _shuffled(self, width: int) -> Iterator[Growth | Refusal]:
        """All that shares channels with these, in proportion."""
        growth = proportional(self._couplings[0], self._atoms.numpy(), Fraction(width, len(self._atoms)))
        if isinstance(growth, str):
            yield Refusal(growth)
            return
        if self._standardised[growth.copies > 0].any():
            return
        for attempt in (growth, replace(growth, numbers=True)):
            try:
                found = placed(attempt, self._grown(attempt))
            except (ForwardError, MorphError) as error:
                found = str(error)
            yield Refusal(found) if isinstance(found, str) else found

    def _even(self, width: int) -> Iterator[Growth | Refusal]:
        """Every class that is normalised together with these, equally often."""
        for wider in [coupling.wider | {"num_groups"} for coupling in self._couplings]:
            coupling = Coupling(self._record, wider)
            chosen = self._normalised_with(coupling)
            if not len(chosen) or self._standardised[np.isin(coupling.classes, chosen)].any():
                return
            causes = [coupling.causes[cls] for cls in chosen.tolist() if cls in coupling.causes]
            times, rest = divmod(width, len(self._atoms))
            if causes:
                yield Refusal(causes[0])
            elif rest:
                near = max(2, round(width / len(self._atoms))) * len(self._atoms)
                yield Refusal("they are normalised together, which whole multiples alone leave as it is", near)
            else:
                growth = Growth.of_classes(coupling, dict.fromkeys(chosen.tolist(), times - 1), even=True)
                yield from _orders(growth)

    def _normalised_with(self, coupling: Coupling) -> Ints:
        """The classes of these channels and of all that is normalised together with them; none if nothing is."""
        chosen, size, normalised = np.unique(coupling.of(self._atoms)), 0, False
        while len(chosen) != size:
            size = len(chosen)
            for _, together in coupling.normalised:
                if np.isin(together, chosen).any():
                    chosen, normalised = np.union1d(chosen, together), True
        return chosen if normalised else chosen[:0]


def _orders(growth: Growth) -> Iterator[Growth]:
    """With copies behind runs and behind single indices, each as it is and with the numbers that modules keep."""
    by_index = replace(growth, by_run=False)
    for ordered in [growth] if growth.same_layout(by_index) else [growth, by_index]:
        yield from (ordered, replace(ordered, numbers=True))


def _families(coupling: Coupling, sequence: Ints, classes: list[int]) -> dict[int, int]:
    """The last of each kind of class, and how many copies of each make equally many channels of `sequence`."""
    last = list({coupling.kind(cls): cls for cls in classes}.values())
    sizes = [int((sequence == cls).sum()) for cls in last]
    return {cls: math.lcm(*sizes) // size for cls, size in zip(last, sizes, strict=True)}


def _with_partners(coupling: Coupling, families: dict[int, int]) -> dict[int, int]:
    """With them as many of each other kind in the outputs that they share, for forwards that cut an output in equal parts."""
    copies = dict(families)
    kinds = {coupling.kind(cls) for cls in families}
    for atoms in coupling.record.outputs.values():
        made = coupling.of(atoms)
        held = [int((made == cls).sum()) * count for cls, count in families.items() if cls in made]
        if held:
            free = [cls for cls in dict.fromkeys(made.tolist()) if cls not in coupling.causes]
            for cls in _families(coupling, made, free):
                if coupling.kind(cls) not in kinds:
                    kinds.add(coupling.kind(cls))
                    copies[cls] = max(1, max(held) // int((made == cls).sum()))
    return copies
