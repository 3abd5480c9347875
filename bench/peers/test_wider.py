"""A linear layer between two others gets half as many units more: by five ways, each on networks of the same weights.

fastmorph grows a copy of the user's own model, which may be any, without a certificate. GroMo's model is made of its own layer
classes and grown in place, its new neurons in pairs without noise; nni 2 grows its own graph and makes a model of that, with
noise; Net2Wider is the paper's, written for this very network.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmorph as fm
from bench.conftest import Race
from bench.floors import Job
from bench.peers.measurements import LEFT_OUT, WIDTHS
from bench.race import Contender
from bench.zoo.models import declare_torchvision_operators

ASKS = {
    "fastmorph": "any nn.Module, one call of it; a copy is grown",
    "fastmorph, following": "any nn.Module, one call of it; a copy is grown",
    "Net2Wider": "code written for this network",
    "GroMo": "a model made of its own layer classes, which is changed",
    "nni": "a graph of its own layers, which makes a model",
}
WAYS = [way for way in ASKS if way not in LEFT_OUT]


@cache
def parent(units: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(units, units), nn.ReLU(), nn.Linear(units, units))


@cache
def batch(units: int) -> Tensor:
    return torch.randn(64, units, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def error(child: Any, units: int) -> float:
    """Of the whole output, relative to its largest value."""
    expected = parent(units)(batch(units))
    return float((child(batch(units)) - expected).abs().max() / expected.abs().max())


def net2wider(model: nn.Sequential) -> nn.Sequential:
    """Net2WiderNet of Chen, Goodfellow and Shlens (2016): copies of random units, whose readers share their weights."""
    first, act, second = model
    old = first.out_features
    new = old * 3 // 2
    of = torch.cat([torch.arange(old), torch.randint(old, (new - old,))])
    counts = torch.bincount(of, minlength=old)
    wide, reader = nn.Linear(old, new), nn.Linear(new, old)
    with torch.no_grad():
        wide.weight.copy_(first.weight[of])
        wide.bias.copy_(first.bias[of])
        reader.weight.copy_(second.weight[:, of] / counts[of])
        reader.bias.copy_(second.bias)
    return nn.Sequential(wide, act, reader)


def gromo_model(units: int) -> tuple[Any, ...]:
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gromo.modules.linear_growing_module import LinearGrowingModule
    first = LinearGrowingModule(units, units, post_layer_function=nn.ReLU(), device="cpu")
    second = LinearGrowingModule(units, units, previous_module=first, device="cpu")
    first.layer.load_state_dict(parent(units)[0].state_dict())
    second.layer.load_state_dict(parent(units)[2].state_dict())
    return first, second


def grow_gromo(first: Any, second: Any) -> Any:
    more = first.layer.out_features // 2
    second.create_layer_extensions(more // 2, neuron_pairing="vv_z_negz", noise_ratio=0.0)
    second.apply_change(scaling_factor=1.0, apply_delta=False, extension_size=more)
    return lambda x: second(first(x))


def nni_graph(units: int) -> tuple[Any, ...]:
    from nni.algorithms.hpo.networkmorphism_tuner.graph import Graph
    from nni.algorithms.hpo.networkmorphism_tuner.layers import StubDense, StubReLU

    graph, node = Graph((units,), weighted=True), 0
    for module in parent(units):
        layer = StubReLU() if isinstance(module, nn.ReLU) else StubDense(units, units)
        layer.import_weights(module)
        node = graph.add_layer(layer, node)
    return (graph,)


def grow_nni(graph: Any) -> Any:
    graph.to_wider_model(0, graph.layer_list[0].units // 2)
    return graph.produce_torch_model()


def contender(way: str, units: int) -> Contender:
    weights = 2 * (2 * units + 3 * units) * units // 2  # read, and half as many more written
    common: dict[str, Any] = {
        "residual": lambda child: error(child, units),
        "tolerance": float("inf"),  # what is not exact is timed, too, and told
        "rounds": 20 if units < 1000 else 6,
        "job": Job(f"{units} -> {units * 3 // 2} -> {units} units", moved=4 * weights),
        "asks": ASKS[way],
    }
    if way == "GroMo":
        return Contender(run=grow_gromo, setup=lambda: gromo_model(units), **common)
    if way == "nni":
        return Contender(run=grow_nni, setup=lambda: nni_graph(units), **common)
    if way == "Net2Wider":
        return Contender(run=net2wider, setup=lambda: (copy.deepcopy(parent(units)),), **common)
    kept = {"structure": fm.follow(parent(units), batch(units))} if way == "fastmorph" else {}
    options: Any = {"example_inputs": batch(units), "verify": False, "generator": 1, **kept}
    return Contender(run=lambda: fm.widen(parent(units), {"0": units * 3 // 2}, **options), **common)


SLOW = ["nni, 1024"]


@pytest.mark.contenders(*([f"{way}, {units}" for way in WAYS] for units in WIDTHS), slow=SLOW)
@pytest.mark.filterwarnings("ignore")
def test_wider(race: Race, name: str) -> None:
    way, _, units = name.rpartition(", ")
    race("wider", contender(way, int(units)))
