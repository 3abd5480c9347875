"""Growth where new channels cannot stand behind old ones: forwards that cut, join and shuffle, as ShuffleNetV2's do.

All axes that share channels grow in proportion, and the resized model is run to see which channels it then has. Where it has at
least as many of each kind as the model had before, old channels take their places among them, in order; the others are new.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np

from fastmorph.graph.coupling import Coupling
from fastmorph.graph.growth import Growth, Layout
from fastmorph.graph.record import Axis, Ints, Record

TOO_FEW = "fewer of them than now would take one of the ways through the model's shuffles"


def proportional(coupling: Coupling, atoms: Ints, ratio: Fraction) -> Growth | str:
    """All axes that share channels with these grow by the ratio, for now without saying which index comes from where."""
    axes = _sharing(coupling, atoms)
    classes = np.unique(np.concatenate([coupling.classes[axis.start : axis.start + axis.size] for axis in axes]))
    for cls in classes.tolist():
        if cls in coupling.causes:
            return coupling.causes[cls]
    for module, together in coupling.normalised:
        if np.isin(together, classes).any():
            return f"{module!r} normalises over them"
    copies = np.zeros(len(coupling.classes))
    layouts = {}
    for axis in axes:
        if (axis.size * ratio).denominator > 1:
            return f"{axis.name!r} shares channels with it and cannot get {ratio} times as many"
        copies[axis.start : axis.start + axis.size] = float(ratio) - 1
        size = int(axis.size * ratio)
        layouts[axis] = Layout(*np.zeros((3, size), np.int64))
    return Growth(coupling, copies, given=layouts)


def _sharing(coupling: Coupling, atoms: Ints) -> list[Axis]:
    """All axes that share a class with these atoms, directly or through others."""
    axes = coupling.places >> 32
    chosen = np.zeros(len(coupling.record.axes), bool)
    chosen[axes[atoms]] = True
    count = 0
    while chosen.sum() != count:
        count = int(chosen.sum())
        held = np.zeros(coupling.record.count, bool)
        held[coupling.classes[chosen[axes]]] = True
        chosen[axes[held[coupling.classes]]] = True
    return [axis for axis, taken in zip(coupling.record.axes, chosen, strict=True) if taken]


def placed(growth: Growth, child: Record) -> Growth | str:
    """The growth with the old channels at places of their kind, once the resized model has run."""
    before, after = growth.coupling, Coupling(child, growth.coupling.wider)
    pairs = list(zip(before.record.axes, child.axes, strict=False))
    if any((old.name, old.dim) != (new.name, new.dim) for old, new in pairs) or len(child.axes) != len(before.record.axes):
        return "the model would run other operators"
    grown = [(old, new) for old, new in pairs if old in growth.layouts]
    if any(new.size != len(growth.layouts[old].origin) for old, new in grown):
        return "its channels would not all grow in proportion"
    wanted = _by_kind(before, [old for old, _ in grown])
    found = _by_kind(after, [new for _, new in grown])
    source, copy, key = np.full(child.count, -1), np.zeros(child.count, np.int64), np.zeros(child.count, np.int64)
    keys = before.record.count
    for kind, classes in wanted.items():
        if len(found[kind]) < len(classes):
            return TOO_FEW
    for kind, places in found.items():
        classes = wanted.get(kind, [])
        for place, cls in zip(places, classes, strict=False):
            source[after.members(place)] = key[after.members(place)] = before.members(cls)
        for number, place in enumerate(places[len(classes) :], 1):
            members = after.members(place)
            copy[members] = number
            key[members] = keys + np.arange(len(members))
            if classes:
                source[members] = before.members(classes[-number % len(classes)])
        keys += len(after.members(places[0]))
    layouts = {}
    for old, new in grown:
        span = slice(new.start, new.start + new.size)
        # What a new kind of channel begins with does not matter: anything of this axis.
        origin = np.where(source[span] < 0, np.arange(new.size) % old.size, source[span] - old.start)
        layouts[old] = Layout(origin, copy[span], key[span])
    return replace(growth, given=layouts, known=all(kind in wanted for kind in found))


def _by_kind(coupling: Coupling, axes: list[Axis]) -> dict[tuple[bytes, bytes, bytes], list[int]]:
    found: dict[tuple[bytes, bytes, bytes], list[int]] = defaultdict(list)
    for cls in np.unique(np.concatenate([coupling.classes[axis.start : axis.start + axis.size] for axis in axes])).tolist():
        found[coupling.kind(cls)].append(cls)
    return found
