"""How a plan's cost grows with a network's depth and width, and that of following it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fastmorph as fm
from bench.conftest import Race
from bench.networks.exact import TOLERANCE, difference
from bench.networks.models import Network, cifar_resnet, stack
from bench.race import Contender

DEPTHS = (20, 56, 110)
WIDTHS = (64, 256, 1024, 4096)


def plan(chosen: Network, work: int) -> Contender:
    def run() -> Any:
        return fm.morph(chosen.model, chosen.plan, example_inputs=chosen.inputs, verify=False, generator=0).model

    return Contender(
        run, lambda child: difference(chosen, child), TOLERANCE, rounds=1, job=chosen.rewriting, work=work, once=True
    )


def following(chosen: Network, work: int) -> Contender:
    def residual(groups: dict[str, fm.Coupled]) -> float:
        widths = {name: len(tensor) for name, tensor in chosen.model.named_parameters() if tensor.ndim > 1}
        return 0.0 if {name: coupled.channels for name, coupled in groups.items()} == widths else float("inf")

    return Contender(
        lambda: fm.follow(chosen.model, chosen.inputs).groups(),
        residual,
        TOLERANCE,
        rounds=1,
        job=chosen.looking,
        work=work,
        once=True,
    )


CONTENDERS: dict[str, Callable[[], Contender]] = {
    **{f"depth {depth}": lambda depth=depth: plan(cifar_resnet(depth), depth) for depth in DEPTHS},
    **{f"width {width}": lambda width=width: plan(stack(width, 4, 1), 4 * width * width) for width in WIDTHS},
    **{f"following {width}": lambda width=width: following(stack(width, 4, 1), width) for width in WIDTHS},
}


@pytest.mark.contenders(*CONTENDERS)
def test_growth(race: Race, name: str) -> None:
    race("networks", CONTENDERS[name]())
