"""The ways in which a layer could get so many more channels, and the first of them that the model can follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import chain

import numpy as np

from fastmorph.errors import MorphError
from fastmorph.graph.coupling import Coupling
from fastmorph.graph.find import how_to_bake
from fastmorph.graph.growth import Growth
from fastmorph.graph.record import Ints
from fastmorph.graph.shuffle import TOO_FEW, placed, proportional
from fastmorph.graph.skeleton import ForwardError
from fastmorph.graph.streams.read import read_stream
from fastmorph.graph.structure import Structure

# Convolutions in groups get wider groups if they can; norms in groups only get more of them.
_WAYS: tuple[frozenset[str], ...] = (frozenset({"groups"}), frozenset())
_RETRIES = 8
_KINDS = 4  # kinds of channels that are tried alone
_ANY_WIDTH = "fill='zero' allows any number, and so does fill='rotate' where no weight is tied"
_HEADS = "heads=True lets heads grow in proportion, for code that divides the width by their number"
_DISTANCE = 8  # how far from the width asked for one is searched that a shuffle allows

Copies = tuple[Ints, Ints]  # classes, and how many copies of each


@dataclass(frozen=True)
class Refusal:
    """Why one way is none: a clause, a width near the one asked for that this way might give, and what else helps.

    `of_stream`: whether it is that of a stream at any width; `unused`: whether for a parameter that the model did not use;
    `fails`: whether because the model would not run.
    """

    cause: str
    near: int | None = None
    remedy: str = "widen another layer"
    of_stream: bool = False
    unused: bool = False
    fails: bool = False


@dataclass(frozen=True)
class Found:
    """A growth that the model can follow.

    Attributes:
        growth: what grows.
        before: the model's structure.
        followed: the grown model's, where a run was needed to see that it can follow.
    """

    growth: Growth
    before: Structure
    followed: Structure | None = None

    @cached_property
    def child(self) -> Structure:
        """The structure that the grown model has."""
        return self.followed or self.before.grown(self.growth)


class Proposals:
    """The ways to widen one layer.

    Args:
        structure: the model's.
        layer: the layer's name.
        way: how it grows where norms read its channels (`Growth.way`); "": by whole multiples.

    Raises MorphError if that makes no channels.
    """

    def __init__(self, structure: Structure, layer: str, way: str = "") -> None:
        self._structure, self._record, self.layer, self._way = structure, structure.record, layer, way
        self.atoms = structure.channels(layer)
        grouped = any(grouping.attribute == "groups" for grouping in self._record.groupings)
        self._couplings = [structure.coupling(wider) for wider in (_WAYS if grouped else _WAYS[:1])]

    def first(self, width: int) -> Growth | None:
        """The growth that is tried first, if it is one of copies."""
        return next((found for found in self._copies(width) if isinstance(found, Growth)), None)

    def find(self, width: int) -> Found | list[Refusal]:
        """A growth to `width` channels after which the model still does the same; else why there is none."""
        refusals: list[Refusal] = []
        ways = [self._streamed(width), self._copies(width), self._shuffled(width), self._even(width)]
        for proposal in chain(*(ways[:1] if self._way == "turned" else ways)):
            found = tried(self._structure, proposal) if isinstance(proposal, Growth) else proposal
            if isinstance(found, Found):
                return found
            if isinstance(proposal, Growth):
                found = replace(found, of_stream=bool(proposal.way))
            refusals.append(found)
        if self._way and any(refusal.unused for refusal in refusals) and self._structure.masked is not None:
            return Proposals(self._structure.masked, self.layer, self._way).find(width)
        if self._way == "axis" and self._couplings[0].is_blocked(self._couplings[0].of(self.atoms)):
            refusals.sort(key=lambda refusal: refusal.of_stream)  # what forbids copies tells more
        return refusals

    def stream(self, width: int) -> Growth | Refusal:
        """So many channels of a stream that norms read, whether or not the model can follow; or why it is none."""
        found = next(iter(self._streamed(width)), None)
        return Refusal("no norm alone reads them", remedy="heads=True is for such a stream") if found is None else found

    def found(self, width: int) -> Found:
        """The same, or a MorphError with the module, the cause and the nearest width that works."""
        found = self.find(width)
        if isinstance(found, Found):
            return found
        nearest = None if self._way == "turned" else self._nearest(width, found)
        ways = _ANY_WIDTH if self._is_stream_of_any(width) else ""
        if self._record.scores and any(refusal.of_stream and refusal.fails for refusal in found):
            ways = _HEADS
        if nearest is None:
            cause = found[0].cause
            blamed = cause.split("'")[1].partition(".parametrizations.")[0] if cause.startswith("'") else None
            bake = None if blamed is None else how_to_bake(self._structure.skeleton.model, blamed)
            remedy = bake or ways or found[0].remedy
            raise MorphError(f"layer {self.layer!r} cannot get more channels: {cause}; {remedy}.")
        near, cause = nearest
        cause = found[0].cause if self._way else cause
        near_by = f"the nearest number that works is {near}" + (ways and f"; {ways}")
        raise MorphError(f"layer {self.layer!r} cannot have {width} channels: {cause}; {near_by}.")

    def _is_stream_of_any(self, width: int) -> bool:
        """Whether norms read the channels, or a tie keeps them, so that another fill gives them this width."""
        coupling = self._couplings[0]
        sequence = coupling.of(self.atoms)
        bound = (coupling.norms[sequence] >= 0).all() or coupling.fixed[sequence].all()
        if self._way or not bound or coupling.is_blocked(sequence):
            return False
        return any(
            isinstance(proposal, Growth) and isinstance(tried(self._structure, proposal), Found)
            for proposal in Proposals(self._structure, self.layer, "axis")._streamed(width)
        )

    def smallest(self, step: int) -> Found | str:
        """A growth by `step` channels, or by the nearest number that works; else why there is none, a clause."""
        width = len(self.atoms) + max(1, step)
        found = self.find(width)
        if isinstance(found, list):
            nearest = self._nearest(width, found)
            if nearest is None:
                return found[0].cause
            found = self.find(nearest[0])
        return found if isinstance(found, Found) else found[0].cause

    def _nearest(self, width: int, refusals: list[Refusal]) -> tuple[int, str] | None:
        """A width near this one that works, and why this one does not."""
        causes = {refusal.near: refusal.cause for refusal in reversed(refusals) if refusal.near is not None}
        for near in sorted(causes, key=lambda near: abs(near - width)):
            if isinstance(self.find(near), Found):
                return near, causes[near]
        if all(refusal.cause != TOO_FEW for refusal in refusals):
            return None
        for near in sorted(range(width - _DISTANCE, width + _DISTANCE + 1), key=lambda near: abs(near - width)):
            if near > len(self.atoms) and any(isinstance(found, Growth) for found in self._shuffled(near)):
                return near, TOO_FEW
        return None

    def _streamed(self, width: int) -> Iterator[Growth | Refusal]:
        """So many more channels of a stream, behind the old ones, if none could be copied alone."""
        coupling = self._couplings[0]
        sequence = coupling.of(self.atoms)
        free = _free(coupling, sequence)
        if not self._way or (self._way == "axis" and (coupling.norms[free] < 0).any()):
            return
        more = np.array([width - len(sequence)])
        growth = Growth.of_classes(coupling, sequence[-1:], more, way=self._way)
        if len(np.unique(sequence)) == len(sequence) and all(not axis.size % len(sequence) for axis in growth.layouts):
            yield from (replace(growth, numbers=True), growth)
        elif self._way == "turned":
            yield Refusal("some tensors hold them several times, or beside others")

    def _copies(self, width: int) -> Iterator[Growth | Refusal]:
        """Copies of the last channel, of the last of each kind, of those and of what is cut like them, or far apart."""
        more = width - len(self.atoms)
        for coupling in self._couplings:
            sequence = coupling.of(self.atoms)
            free = _free(coupling, sequence)
            if not len(free):
                yield Refusal(coupling.cause(int(sequence[-1])))
                continue
            normalised = coupling.norms[free]
            free = free[normalised < 0]
            if not len(free):
                name = coupling.normalised[int(normalised[-1])][0]
                yield Refusal(f"{repr(name) if name else 'the model itself'} normalises over them")
                continue
            tried: list[Copies] = []
            for classes, counts in self._selections(coupling, sequence, free, more):
                if any(np.array_equal(classes, other) and np.array_equal(counts, same) for other, same in tried):
                    continue
                tried.append((classes, counts))
                times = counts * (2 if coupling.standardised[classes].any() else 1)  # twins alone leave a row's mean
                step = int((_counts(sequence, classes) * times).sum())
                if more % step:
                    near = len(self.atoms) + max(1, round(more / step)) * step
                    yield Refusal(f"they come in steps of {step}", near)
                    continue
                yield from _orders(Growth.of_classes(coupling, classes, times * (more // step)))

    def _selections(self, coupling: Coupling, sequence: Ints, free: Ints, more: int) -> Iterator[Copies]:
        """Classes to copy, each selection sorted by class; `more` channels are wanted."""
        yield free[-1:], np.ones(1, np.int64)
        families = _families(coupling, sequence, free)
        yield _sorted(families)
        yield _sorted(_with_partners(coupling, families))
        for cls in families[0][-_KINDS - 1 : -1]:
            yield np.array([cls]), np.ones(1, np.int64)
        spread = free[:: -max(1, len(free) // more)]
        yield _sorted((spread, np.ones(len(spread), np.int64)))

    def _shuffled(self, width: int) -> Iterator[Growth | Refusal]:
        """All that shares channels with these, in proportion."""
        growth = proportional(self._couplings[0], self.atoms.numpy(), Fraction(width, len(self.atoms)))
        if isinstance(growth, str):
            yield Refusal(growth)
            return
        if self._record.mask("standardised")[growth.copies > 0].any():
            return
        for attempt in (growth, replace(growth, numbers=True)):
            try:
                child = self._structure.grown(attempt)
                found = placed(attempt, child.record, child.coupling(attempt.coupling.wider))
            except (ForwardError, MorphError) as error:
                found = str(error)
            yield Refusal(found) if isinstance(found, str) else found

    def _even(self, width: int) -> Iterator[Growth | Refusal]:
        """Every class that is normalised together with these, equally often."""
        for wider in [coupling.wider | {"num_groups"} for coupling in self._couplings]:
            coupling = self._structure.coupling(wider)
            chosen = self._normalised_with(coupling)
            if not len(chosen) or coupling.standardised[chosen].any():
                return
            causes = coupling.causes(chosen)
            times, rest = divmod(width, len(self.atoms))
            if causes:
                yield Refusal(causes[0])
            elif rest:
                near = max(2, round(width / len(self.atoms))) * len(self.atoms)
                yield Refusal("they are normalised together, which whole multiples alone leave as it is", near)
            else:
                yield from _orders(Growth.of_classes(coupling, chosen, np.full(len(chosen), times - 1), even=True))

    def _normalised_with(self, coupling: Coupling) -> Ints:
        """The classes of these channels and of all that is normalised together with them; none if nothing is."""
        chosen, size, normalised = np.unique(coupling.of(self.atoms)), 0, False
        while len(chosen) != size:
            size = len(chosen)
            for _, together in coupling.normalised:
                if np.isin(together, chosen).any():
                    chosen, normalised = np.union1d(chosen, together), True
        return chosen if normalised else chosen[:0]


def tried(structure: Structure, growth: Growth) -> Found | Refusal:
    """The growth, with modules to be cautious about, if the model can follow."""
    stranger = structure.untouched(growth)
    if stranger is not None:
        return Refusal(
            f"the model did not use {stranger!r} when it was run, which is as wide as something that would grow: whether it "
            "shares these channels is not known",
            remedy="pass example_inputs= under which the model uses it, or take it out of the model",
            unused=True,
        )
    if structure.is_sure(growth):
        return Found(growth, structure)
    try:
        child = structure.grown(growth)
    except MorphError as error:
        return Refusal(str(error))
    except ForwardError as error:
        inner = _with_inner(structure, growth, error.module)
        if inner is not None:
            return tried(structure, inner)
        if growth.numbers and error.module not in growth.cautious and len(growth.cautious) < _RETRIES:
            return tried(structure, replace(growth, cautious=growth.cautious | {error.module}))
        return Refusal(str(error), remedy="let that module take its sizes from its tensors, or widen another layer", fails=True)
    found = growth.difference(child.record, child.coupling(growth.coupling.wider))
    if found is None and growth.way:
        stream = read_stream(growth.streamed, structure.tapes, child.record)
        return Refusal(stream) if isinstance(stream, str) else Found(replace(growth, stream=stream), structure, child)
    if found is None:
        return Found(growth, structure, child)
    if growth.numbers and found.module is not None and found.module not in growth.plain:
        return tried(structure, replace(growth, plain=growth.plain | _like(structure, found.module)))
    return Refusal(found.cause)


def _like(structure: Structure, module: str) -> frozenset[str]:
    """The names of all modules of this one's class."""
    model = structure.skeleton.model
    kind = type(model.get_submodule(module))
    return frozenset(name for name, other in model.named_modules() if type(other) is kind)


def _with_inner(structure: Structure, growth: Growth, module: str) -> Growth | None:
    """With as many of all that is made inside modules like this one: attention may want to be as wide as its input."""
    if not (growth.even and growth.numbers):
        return None
    coupling = growth.coupling
    inside = tuple(f"{name}." for name in _like(structure, module) if name)
    made = [coupling.of(atoms) for name, atoms in structure.record.outputs.items() if name.startswith(inside)]
    held = np.zeros(structure.record.count, np.bool_)
    held[np.concatenate([*made, np.zeros(0, np.int64)])] = True
    added = (held & ~coupling.fixed)[coupling.classes] & (growth.copies == 0)
    return replace(growth, copies=np.where(added, growth.copies.max(), growth.copies)) if added.any() else None


def _orders(growth: Growth) -> Iterator[Growth]:
    """With copies behind runs and behind single indices, each as it is and with the numbers that modules keep."""
    yield from (growth, replace(growth, numbers=True))
    by_index = replace(growth, by_run=False)
    if not growth.same_layout(by_index):
        yield from (by_index, replace(by_index, numbers=True))


def _free(coupling: Coupling, sequence: Ints) -> Ints:
    """The classes that can be copied, in the order of their first places in a sequence."""
    made, first = np.unique(sequence, return_index=True)
    made = made[np.argsort(first)]
    return made[~coupling.fixed[made]]


def _counts(sequence: Ints, classes: Ints) -> Ints:
    """How often each class is in a sequence."""
    ordered = np.sort(sequence)
    return np.searchsorted(ordered, classes, "right") - np.searchsorted(ordered, classes)


def _sorted(copies: Copies) -> Copies:
    order = np.argsort(copies[0])
    return copies[0][order], copies[1][order]


def _families(coupling: Coupling, sequence: Ints, classes: Ints) -> Copies:
    """The last of each kind of class, and how many copies of each make equally many channels of `sequence`."""
    kinds = coupling.kinds[classes]
    _, first = np.unique(kinds, return_index=True)
    _, back = np.unique(kinds[::-1], return_index=True)
    last = classes[len(classes) - 1 - back[np.argsort(first)]]
    sizes = _counts(sequence, last)
    return last, math.lcm(*sizes.tolist()) // sizes


def _with_partners(coupling: Coupling, families: Copies) -> Copies:
    """With them as many of each other kind in the outputs that they share, for forwards that cut an output in equal parts."""
    copies = dict(zip(*(values.tolist() for values in families), strict=True))
    kinds = set(coupling.kinds[families[0]].tolist())
    for atoms in coupling.record.outputs.values():
        made = coupling.of(atoms)
        held = _counts(made, families[0]) * families[1]
        if held.any():
            others = _free(coupling, made)
            for cls in _families(coupling, made, others[coupling.norms[others] < 0])[0].tolist():
                if int(coupling.kinds[cls]) not in kinds:
                    kinds.add(int(coupling.kinds[cls]))
                    copies[cls] = max(1, int(held.max()) // int((made == cls).sum()))
    return np.array(list(copies)), np.array(list(copies.values()))
