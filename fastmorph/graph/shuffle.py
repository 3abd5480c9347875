"""Growth where new channels cannot stand behind old ones: forwards that cut, join and shuffle, as ShuffleNetV2's do.

All axes that share channels grow in proportion, and the resized model is run to see which channels it then has. Where it has at
least as many of each kind as the model had before, old channels take their places among them, in order; the others are new.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from fastmorph.graph.coupling import Coupling, kinds
from fastmorph.graph.growth import Growth, Layout
from fastmorph.graph.ragged import positions
from fastmorph.graph.record import Axis, Ints, Record

TOO_FEW = "fewer of them than now would take one of the ways through the model's shuffles"


def proportional(coupling: Coupling, atoms: Ints, ratio: Fraction) -> Growth | str:
    """All axes that share channels with these grow by the ratio, for now without saying which index comes from where."""
    axes = _sharing(coupling, atoms)
    classes = np.unique(np.concatenate([coupling.classes[axis.start : axis.start + axis.size] for axis in axes]))
    if coupling.fixed[classes].any():
        return coupling.causes(classes)[0]
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
    axes = coupling.axes
    chosen = np.zeros(len(coupling.record.axes), bool)
    chosen[axes[atoms]] = True
    count = 0
    while chosen.sum() != count:
        count = int(chosen.sum())
        held = np.zeros(coupling.record.count, bool)
        held[coupling.classes[chosen[axes]]] = True
        chosen[axes[held[coupling.classes]]] = True
    return [axis for axis, taken in zip(coupling.record.axes, chosen, strict=True) if taken]


def placed(growth: Growth, child: Record, after: Coupling) -> Growth | str:
    """The growth with the old channels at places of their kind, once the resized model has run."""
    before = growth.coupling
    pairs = list(zip(before.record.axes, child.axes, strict=False))
    if any((old.name, old.dim) != (new.name, new.dim) for old, new in pairs) or len(child.axes) != len(before.record.axes):
        return "the model would run other operators"
    grown = [(old, new) for old, new in pairs if old in growth.layouts]
    if any(new.size != len(growth.layouts[old].origin) for old, new in grown):
        return "its channels would not all grow in proportion"
    kinds_before, kinds_after = kinds(before, after)
    old, old_kinds = _by_kind(before, kinds_before, [axis for axis, _ in grown])
    new, new_kinds = _by_kind(after, kinds_after, [axis for _, axis in grown])
    there, here = (np.searchsorted(of, old_kinds, "right") - np.searchsorted(of, old_kinds) for of in (new_kinds, old_kinds))
    if (there < here).any():
        return TOO_FEW
    first = np.searchsorted(old_kinds, new_kinds)  # of the old classes of each new one's kind, in `old`
    count = np.searchsorted(old_kinds, new_kinds, "right") - first
    _, ranks, sizes = np.unique(new_kinds, return_inverse=True, return_counts=True)
    number = positions(sizes) - count + 1  # of a copy, from 1 on; old channels come first
    known, is_old = count > 0, number < 1
    donor = old[np.where(known, first + np.where(is_old, number + count - 1, -number % np.maximum(count, 1)), 0)]
    # Now atom by atom: the members of a class, and those of its donor, in order.
    atoms, row = after.members_of(new)
    member = after.ranks[atoms]
    given = before.starts[donor][row] + member
    given = before.order[np.minimum(given, before.record.count - 1)]
    source, copy, key = np.full(child.count, -1), np.zeros(child.count, np.int64), np.zeros(child.count, np.int64)
    source[atoms] = np.where(known[row], given, -1)
    copy[atoms] = np.where(is_old, 0, number)[row]
    # New ones of one kind have one key, which no old one has.
    key[atoms] = np.where(is_old[row], given, before.record.count + ranks[row] * (1 + int(member.max())) + member)
    layouts = {}
    for axis, wider in grown:
        span = slice(wider.start, wider.start + wider.size)
        # What a new kind of channel begins with does not matter: anything of this axis.
        origin = np.where(source[span] < 0, np.arange(wider.size) % axis.size, source[span] - axis.start)
        layouts[axis] = Layout(origin, copy[span], key[span])
    return replace(growth, given=layouts, known=bool(known.all()))


def _by_kind(coupling: Coupling, kinds: Ints, axes: list[Axis]) -> tuple[Ints, Ints]:
    """The classes of axes, sorted by kind, and their kinds."""
    classes = np.unique(np.concatenate([coupling.classes[axis.start : axis.start + axis.size] for axis in axes]))
    classes = classes[np.argsort(kinds[classes], kind="stable")]
    return classes, kinds[classes]
