"""Following a network and telling every layer's coupling, beside Torch-Pruning's graph and all its groups.

Before either is timed, both must name the same layers that share the channels of each of Torch-Pruning's groups.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import pytest
from torch import nn

import fastmorph as fm
from bench.conftest import Race
from bench.networks.models import Network, network
from bench.race import Contender

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tp = pytest.importorskip("torch_pruning")

COMPARED = ("resnet50", "resnet152", "densenet121", "vgg16")


def ours(chosen: Network) -> dict[str, fm.Coupled]:
    return fm.follow(chosen.model, chosen.inputs).groups()


def theirs(chosen: Network) -> list[Any]:
    graph = tp.DependencyGraph().build_dependency(chosen.model, example_inputs=chosen.inputs)
    return list(graph.get_all_groups())


def makers(group: Any, names: dict[nn.Module, str]) -> frozenset[str]:
    """The layers whose output channels a group of Torch-Pruning prunes."""
    layers = [
        item.dep.target.module
        for item in group
        if item.dep.handler in (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
    ]
    return frozenset(names[layer] for layer in layers)


@lru_cache(maxsize=1)
def agree(chosen: Network) -> bool:
    names = {module: name for name, module in chosen.model.named_modules()}
    groups = {makers(group, names) for group in theirs(chosen)}
    found = {
        frozenset(row.name.removesuffix(".weight") for row in coupled.rows if row.role == "makes")
        for coupled in ours(chosen).values()
    }
    return bool(groups) and groups <= found


@pytest.mark.contenders(*([f"{name} {way}" for way in ("groups", "Torch-Pruning")] for name in COMPARED))
def test_following(race: Race, name: str) -> None:
    chosen = network(name.partition(" ")[0])
    run = (lambda: ours(chosen)) if name.endswith("groups") else (lambda: theirs(chosen))
    residual = lambda _: 0.0 if agree(chosen) else float("inf")  # noqa: E731
    race("networks", Contender(run, residual, 0.0, rounds=1, job=chosen.looking, once=True))
