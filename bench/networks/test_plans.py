"""A plan that widens every block of a network: beside one widened block, and, without weights, beside running its structure.

And one that mixes widths with other operators, beside plans of each alone.

The child of each plan is compared with its parent before it is timed, the architecture of `restructure` with the child's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmorph as fm
from bench.conftest import Race
from bench.floors import Job
from bench.networks.exact import TOLERANCE, difference, difference_of_outputs
from bench.networks.models import NETWORKS, Network, network
from bench.race import Contender

CONSUMED = ("resnet50", "vgg16")
MIXED = ("resnet50", "resnet152")
WAYS = ("plan", "one", "restructure", "structure")


def contender(way: str, chosen: Network) -> Contender:
    model, inputs, plan = chosen.model, chosen.inputs, chosen.plan

    def morphed(operators: list[Any]) -> Callable[[], nn.Module]:
        return lambda: fm.morph(model, operators, example_inputs=inputs, verify=False, generator=0).model

    if way == "plan":
        return _once(chosen.rewriting, morphed(plan), lambda child: difference(chosen, child))
    if way == "one":
        return _once(chosen.rewriting, morphed([plan[len(plan) // 2]]), lambda child: difference_of_outputs(chosen, child))
    if way == "restructure":
        expected = {name: value.shape for name, value in morphed(plan)().state_dict().items()}
        return _once(
            chosen.looking,
            lambda: fm.restructure(model, plan, example_inputs=inputs),
            lambda child: 0.0 if {n: v.shape for n, v in child.state_dict().items()} == expected else float("inf"),
        )
    if way == "consume":
        return _once(
            chosen.rewriting,
            lambda parent: fm.morph(parent, plan, example_inputs=inputs, verify=False, generator=0, consume=True).model,
            lambda child: difference(chosen, child),
            setup=lambda: (copy.deepcopy(model),),
        )
    if way in ("mixed", "parts"):
        # Every block gets a wider first convolution, a second one of two layers, and then a larger kernel in the first.
        deepened = [fm.Deepen(_second(operator.layer), activation="relu") for operator in plan]
        grown = [fm.GrowKernel(operator.layer, 3) for operator in plan]
        plans = [list(chain(*zip(plan, deepened, grown, strict=True)))] if way == "mixed" else [plan, deepened, grown]
        return _once(
            chosen.rewriting,
            lambda: [morphed(operators)() for operators in plans],
            lambda children: max(difference_of_outputs(chosen, child) for child in children),
        )
    assert way == "structure"
    fakes, fake_inputs, mode = _on_fake_tensors(chosen)

    def run() -> Any:
        with mode, torch.no_grad(), _layer_by_layer():
            return fakes(fake_inputs)

    with torch.no_grad():
        expected = model(inputs).shape
    return _once(chosen.looking, run, lambda found: 0.0 if found.shape == expected else float("inf"))


def _second(layer: str) -> str:
    return layer.removesuffix("1") + "2"


def _once(
    job: Job, run: Callable[..., Any], residual: Callable[[Any], float], setup: Callable[[], tuple[Any, ...]] = tuple
) -> Contender:
    return Contender(run, residual, TOLERANCE, rounds=1, job=job, setup=setup, once=True)


def _on_fake_tensors(chosen: Network) -> tuple[nn.Module, Tensor, FakeTensorMode]:
    mode = FakeTensorMode()
    tensors = [*chosen.model.parameters(), *chosen.model.buffers()]
    fakes = copy.deepcopy(chosen.model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    return fakes, mode.from_tensor(chosen.inputs), mode


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """A transformer's own operators: PyTorch's fast path runs a whole encoder layer as one, which has no structure."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _ways(name: str) -> tuple[str, ...]:
    return WAYS + ("consume",) * (name in CONSUMED) + ("mixed", "parts") * (name in MIXED)


SLOW = [f"{name} {way}" for name in MIXED for way in ("mixed", "parts")]


@pytest.mark.contenders(*([f"{name} {way}" for way in _ways(name)] for name in NETWORKS), slow=SLOW)
def test_plans(race: Race, name: str) -> None:
    chosen, _, way = name.partition(" ")
    race("networks", contender(way, network(chosen)))
