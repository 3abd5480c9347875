"""The certificate of a widened network, beside the forward passes that it needs: both models in float32 and in float64."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastmorph as fm
from bench.conftest import Race
from bench.floors import Job
from bench.networks.exact import TOLERANCE
from bench.networks.models import network
from bench.race import Contender

CERTIFIED = ("resnet50", "vgg16")


@lru_cache(maxsize=1)
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    chosen = network(name)
    plan = [chosen.plan[len(chosen.plan) // 2]]
    return chosen.model, fm.morph(chosen.model, plan, example_inputs=chosen.inputs, verify=False, generator=0).model


@lru_cache(maxsize=1)
def job(name: str) -> Job:
    """What both models compute, in float32 and in float64."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for model in pair(name):
            model(network(name).inputs)
    count = float(counter.get_total_flops())
    return Job(network(name).shape, operations={"float32": count, "float64": count})


def certificate(name: str) -> Contender:
    parent, child = pair(name)
    inputs = network(name).inputs

    def residual(found: fm.Certificate) -> float:
        assert found, str(found)
        assert passes(name) == 4, "the certificate needs other passes than those that it is held against"
        return found.max_rel

    return Contender(lambda: fm.verify(parent, child, inputs), residual, TOLERANCE, rounds=1, job=job(name), once=True)


def passes(name: str) -> int:
    """How often the certificate runs a model."""
    calls: list[str] = []
    models = pair(name)
    handles = [model.register_forward_pre_hook(lambda *_: calls.append("")) for model in models]
    fm.verify(*models, network(name).inputs)
    for handle in handles:
        handle.remove()
    return len(calls)


def forwards(name: str) -> Contender:
    inputs = network(name).inputs
    runs = [(model, inputs) for model in pair(name)]
    runs += [(copy.deepcopy(model).double(), inputs.double()) for model in pair(name)]

    def run() -> list[Any]:
        with torch.no_grad():
            return [model(x) for model, x in runs]

    def residual(outputs: list[torch.Tensor]) -> float:
        exact = outputs[2]
        return float(max((found - exact).abs().max() for found in outputs) / exact.abs().max())

    return Contender(run, residual, TOLERANCE, rounds=1, job=job(name), once=True)


@pytest.mark.contenders(*([f"{name} {way}" for way in ("certificate", "forwards")] for name in CERTIFIED))
def test_certificate(race: Race, name: str) -> None:
    chosen, _, way = name.partition(" ")
    race("networks", (certificate if way == "certificate" else forwards)(chosen))
