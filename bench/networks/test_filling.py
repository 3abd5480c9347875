"""Filling alone: the tensors of a widened stack of large convolutions written, beside copying them.

The stack has 57 million weights and gets 83: five of its six layers go from 1024 to 1280 channels. The wide one has two layers
of 2048 channels, 75 million weights, with 2560 between them.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import pytest
import torch
from torch import Tensor

import fastmorph as fm
from bench.conftest import Race
from bench.floors import Job
from bench.networks.exact import TOLERANCE, difference
from bench.networks.models import Network, stack
from bench.race import Contender
from fastmorph.equation.randomness import Stream
from fastmorph.graph.widths import Stage, Width, find_stages
from fastmorph.morphs.widen_fill import FILLS, Filling, Marks, fill_tensors

SIZES = {"stack": (1024, 6), "wide": (2048, 2)}


@lru_cache(maxsize=1)
def stage(name: str) -> Stage:
    chosen = stack(*SIZES[name], 3)
    widths = [Width(operator.layer, operator.channels, lambda growth: None) for operator in chosen.plan]
    (found,), _ = find_stages(fm.follow(chosen.model, chosen.inputs), widths)
    return found


def filled(chosen: Network, name: str, fill: str) -> dict[str, Tensor]:
    """The grown tensors, by name."""
    whole = stage(name).growth
    marks = Marks(whole.coupling.record)
    fillings = [Filling(growth, fill, Stream(number), marks) for number, growth in enumerate(stage(name).growths)]
    grown = {}
    for key in whole.names:
        parts = [filling for filling in fillings if key in filling.growth.names]
        ((grown[key], _, _),) = fill_tensors([(parts, key, chosen.model.get_parameter(key).detach())])
    return grown


def contender(name: str, way: str) -> Contender:
    chosen = stack(*SIZES[name], 3)
    if way == "clone":
        child = filled(chosen, name, "zero")
        run = lambda: {key: value.clone() for key, value in child.items()}  # noqa: E731
    else:
        run = lambda: filled(chosen, name, way)  # noqa: E731

    def residual(grown: dict[str, Tensor]) -> float:
        child = fm.restructure(chosen.model, chosen.plan, example_inputs=chosen.inputs)
        child.load_state_dict({**chosen.model.state_dict(), **grown})
        return difference(chosen, child)

    whole = stage(name).growth
    old = {key: chosen.model.get_parameter(key) for key in whole.names}
    read, written = sum(value.nbytes for value in old.values()), sum(4 * prod(whole.shape(key, old[key].shape)) for key in old)
    job = Job(chosen.shape, moved=written + (written if way == "clone" else read))
    return Contender(run, residual, TOLERANCE, rounds=1, job=job, once=True)


@pytest.mark.contenders(*([f"{name} {way}" for way in ("clone", *FILLS)] for name in SIZES))
def test_filling(race: Race, name: str) -> None:
    chosen, _, way = name.partition(" ")
    with torch.no_grad():
        race("networks", contender(chosen, way))
