"""A layer in front of another gets half as many channels more: by five ways, each on networks of the same weights.

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
from bench.peers.measurements import LEFT_OUT, WIDTHS, of_kind
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


def layer(kind: str, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs) if kind == "units" else nn.Conv2d(inputs, outputs, 3, padding=1)


@cache
def parent(kind: str, old: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(layer(kind, old, old), nn.ReLU(), layer(kind, old, old))


@cache
def batch(kind: str, old: int) -> Tensor:
    shape = (64, old) if kind == "units" else (2, old, 12, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def error(child: Any, kind: str, old: int) -> float:
    """Of the whole output, relative to its largest value."""
    expected = parent(kind, old)(batch(kind, old))
    return float((child(batch(kind, old)) - expected).abs().max() / expected.abs().max())


def net2wider(model: nn.Sequential) -> nn.Sequential:
    """Net2WiderNet of Chen, Goodfellow and Shlens (2016): copies of random units, whose readers share their weights."""
    first, act, second = model
    old, kind = len(first.weight), "units" if first.weight.ndim == 2 else "convolutions"
    new = old * 3 // 2
    of = torch.cat([torch.arange(old), torch.randint(old, (new - old,))])
    counts = torch.bincount(of, minlength=old)[of].view(-1, *[1] * (first.weight.ndim - 2))
    wide, reader = layer(kind, old, new), layer(kind, new, old)
    with torch.no_grad():
        wide.weight.copy_(first.weight[of])
        wide.bias.copy_(first.bias[of])
        reader.weight.copy_(second.weight[:, of] / counts)
        reader.bias.copy_(second.bias)
    return nn.Sequential(wide, act, reader)


def gromo_model(units: int) -> tuple[Any, ...]:
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gromo.modules.linear_growing_module import LinearGrowingModule
    first = LinearGrowingModule(units, units, post_layer_function=nn.ReLU(), device="cpu")
    second = LinearGrowingModule(units, units, previous_module=first, device="cpu")
    first.layer.load_state_dict(parent("units", units)[0].state_dict())
    second.layer.load_state_dict(parent("units", units)[2].state_dict())
    return first, second


def grow_gromo(first: Any, second: Any) -> Any:
    more = first.layer.out_features // 2
    second.create_layer_extensions(more // 2, neuron_pairing="vv_z_negz", noise_ratio=0.0)
    second.apply_change(scaling_factor=1.0, apply_delta=False, extension_size=more)
    return lambda x: second(first(x))


def nni_graph(kind: str, old: int) -> tuple[Any, ...]:
    from nni.algorithms.hpo.networkmorphism_tuner.graph import Graph
    from nni.algorithms.hpo.networkmorphism_tuner.layers import StubConv2d, StubDense, StubReLU

    graph, node = Graph((old,) if kind == "units" else (12, 12, old), weighted=True), 0
    for module in parent(kind, old):
        stub = (
            StubReLU() if isinstance(module, nn.ReLU) else StubDense(old, old) if kind == "units" else StubConv2d(old, old, 3)
        )
        stub.import_weights(module)
        node = graph.add_layer(stub, node)
    return (graph,)


def grow_nni(graph: Any) -> Any:
    graph.to_wider_model(0, len(graph.layer_list[0].get_weights()[1]) // 2)
    return graph.produce_torch_model()


def contender(way: str, kind: str, old: int) -> Contender:
    model, inputs, new = parent(kind, old), batch(kind, old), old * 3 // 2
    read = model[0].weight.nbytes + model[2].weight.nbytes  # and half as many more are written
    common: dict[str, Any] = {
        "residual": lambda child: error(child, kind, old),
        "tolerance": float("inf"),  # what is not exact is timed, too, and told
        "rounds": 20 if read < 2**20 else 6,
        "job": Job(f"{old} {'units' if kind == 'units' else 'channels, 3x3,'} to {new}", moved=2.5 * read),
        "asks": ASKS[way],
    }
    if way == "GroMo":
        return Contender(run=grow_gromo, setup=lambda: gromo_model(old), **common)
    if way == "nni":
        return Contender(run=grow_nni, setup=lambda: nni_graph(kind, old), **common)
    if way == "Net2Wider":
        return Contender(run=net2wider, setup=lambda: (copy.deepcopy(model),), **common)
    kept = {"structure": fm.follow(model, inputs)} if way == "fastmorph" else {}
    options: Any = {"example_inputs": inputs, "verify": False, "generator": 1, **kept}
    return Contender(run=lambda: fm.widen(model, {"0": new}, **options), **common)


SLOW = ["nni, 1024 units"]


@pytest.mark.contenders(*([f"{way}, {old} {kind}" for way in WAYS if way in of_kind(kind)] for old, kind in WIDTHS), slow=SLOW)
@pytest.mark.filterwarnings("ignore")
def test_wider(race: Race, name: str) -> None:
    way, _, job = name.rpartition(", ")
    old, kind = job.split()
    race("wider", contender(way, kind, int(old)))
