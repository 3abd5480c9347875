"""A linear layer of 256 units between two others gets 384: by four ways, each on networks of the same weights.

fastmorph grows the user's own model, which may be any, without a certificate; GroMo's model is made of its own layer classes,
its new neurons in pairs without noise; Net2Wider is the paper's, written for this very network.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmorph as fm
from bench.conftest import Race
from bench.race import Contender
from bench.zoo.models import declare_torchvision_operators

OLD, NEW = 256, 384
NAMES = ("fastmorph", "fastmorph, following", "Net2Wider", *["GroMo"] * (importlib.util.find_spec("gromo") is not None))


@cache
def parent() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(OLD, OLD), nn.ReLU(), nn.Linear(OLD, OLD))


@cache
def batch() -> Tensor:
    return torch.randn(64, OLD, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def error(child: Any) -> float:
    """Of the whole output, relative to its largest value."""
    expected = parent()(batch())
    return float((child(batch()) - expected).abs().max() / expected.abs().max())


def net2wider(model: nn.Sequential) -> nn.Sequential:
    """Net2WiderNet of Chen, Goodfellow and Shlens (2016): copies of random units, whose readers share their weights."""
    first, act, second = model
    of = torch.cat([torch.arange(OLD), torch.randint(OLD, (NEW - OLD,))])
    counts = torch.bincount(of, minlength=OLD)
    wide, reader = nn.Linear(OLD, NEW), nn.Linear(NEW, OLD)
    with torch.no_grad():
        wide.weight.copy_(first.weight[of])
        wide.bias.copy_(first.bias[of])
        reader.weight.copy_(second.weight[:, of] / counts[of])
        reader.bias.copy_(second.bias)
    return nn.Sequential(wide, act, reader)


def gromo_model() -> tuple[Any, ...]:
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gromo.modules.linear_growing_module import LinearGrowingModule
    first = LinearGrowingModule(OLD, OLD, post_layer_function=nn.ReLU(), device="cpu")
    second = LinearGrowingModule(OLD, OLD, previous_module=first, device="cpu")
    first.layer.load_state_dict(parent()[0].state_dict())
    second.layer.load_state_dict(parent()[2].state_dict())
    return first, second


def grow_gromo(first: Any, second: Any) -> Any:
    second.create_layer_extensions((NEW - OLD) // 2, neuron_pairing="vv_z_negz", noise_ratio=0.0)
    second.apply_change(scaling_factor=1.0, apply_delta=False, extension_size=NEW - OLD)
    return lambda x: second(first(x))


def contender(name: str) -> Contender:
    common = {"residual": error, "tolerance": float("inf"), "rounds": 20}  # what is not exact is timed, too, and told
    if name == "GroMo":
        return Contender(run=grow_gromo, setup=gromo_model, **common)
    if name == "Net2Wider":
        return Contender(run=net2wider, setup=lambda: (copy.deepcopy(parent()),), **common)
    kept = {"structure": fm.follow(parent(), batch())} if name == "fastmorph" else {}
    options: Any = {"example_inputs": batch(), "verify": False, "generator": 1, **kept}
    return Contender(run=lambda: fm.widen(parent(), {"0": NEW}, **options), **common)


@pytest.mark.contenders(*NAMES)
@pytest.mark.filterwarnings("ignore")
def test_wider(race: Race, name: str) -> None:
    race("wider", contender(name))
