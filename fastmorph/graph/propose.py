"""The ways in which a layer could get so many more channels, and the first of them that the model can follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastmorph.errors import MorphError
from fastmorph.graph.attributes import update_attributes
from fastmorph.graph.coupling import Coupling
from fastmorph.graph.growth import Growth
from fastmorph.graph.record import Record
from fastmorph.graph.skeleton import Skeleton

_WAYS = (frozenset({"groups"}), frozenset())  # convolutions in groups get wider groups if they can, norms never do
_EVEN = frozenset({"groups", "num_groups"})


@dataclass(frozen=True)
class Refusal:
    """Why one way is none: a clause, and a width near the one asked for that this way could give."""

    cause: str
    near: int | None = None


def find_growth(skeleton: Skeleton, record: Record, atoms: Tensor, width: int, inputs: tuple[Any, ...]) -> Growth | list[Refusal]:
    """A growth of the channels `atoms` to `width` of them after which the model still does the same; else why there is none."""
    refusals = []
    for proposal in _proposals(record, atoms, width):
        if isinstance(proposal, Growth):
            cause = try_growth(skeleton, proposal, inputs)
            if cause is None:
                return proposal
            proposal = Refusal(cause)
        refusals.append(proposal)
    return refusals


def try_growth(skeleton: Skeleton, growth: Growth, inputs: tuple[Any, ...]) -> str | None:
    """Why the model cannot follow, a clause; None if it can. The skeleton is left as it was."""
    resized = skeleton.copy()
    for name, shape in growth.shapes().items():
        resized.resize(name, shape)
    update_attributes(resized.model, growth)
    try:
        return growth.difference(resized.trace(inputs))
    except Exception as error:
        return str(error)


def _proposals(record: Record, atoms: Tensor, width: int) -> Iterator[Growth | Refusal]:
    old = len(atoms)
    grouped = any(choice.attribute == "groups" for choice in record.choices)
    for wider in _WAYS if grouped else _WAYS[:1]:
        coupling = Coupling(record, wider)
        sequence = coupling.of(atoms)
        classes, counts = np.unique(sequence, return_counts=True)
        free = [int(cls) for cls in dict.fromkeys(sequence.tolist()) if cls not in coupling.causes]
        if not free:
            yield Refusal(coupling.causes[int(sequence[-1])])
            continue
        held = {cls: module for module, together in coupling.normalised for cls in together.tolist()}
        if free[-1] in held:
            yield Refusal(f"{held[free[-1]]!r} normalises over them")
            continue
        free = [cls for cls in free if cls not in held]
        sizes = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        for templates in ([free[-1]], _families(coupling, free)):
            step = sum(sizes[cls] for cls in templates)
            if (width - old) % step:
                yield Refusal(f"they come in steps of {step}", old + max(1, round((width - old) / step)) * step)
                continue
            for by_run in (True, False):
                yield Growth.of_classes(coupling, dict.fromkeys(templates, (width - old) // step), by_run=by_run)
    yield _even(record, atoms, width)


def _families(coupling: Coupling, classes: list[int]) -> list[int]:
    """The last of each kind of class."""
    return list({coupling.kind(cls): cls for cls in classes}.values())


def _even(record: Record, atoms: Tensor, width: int) -> Growth | Refusal:
    """Every class that is normalised together with these, equally often."""
    coupling = Coupling(record, _EVEN)
    old = len(atoms)
    chosen = np.unique(coupling.of(atoms))
    size = 0
    while len(chosen) != size:
        size = len(chosen)
        for _, together in coupling.normalised:
            if np.isin(together, chosen).any():
                chosen = np.union1d(chosen, together)
    for cls in chosen.tolist():
        if cls in coupling.causes:
            return Refusal(coupling.causes[cls])
    if width % old:
        return Refusal("whole multiples alone leave their mean and variance as they are", max(2, round(width / old)) * old)
    return Growth.of_classes(coupling, dict.fromkeys(chosen.tolist(), width // old - 1), even=True)
