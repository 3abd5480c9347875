"""The model of cost: its counts are those of a run, and its figures follow from them."""

from __future__ import annotations

import math

import pytest
import torch
from commands import fastmorph
from sharded_networks import HEAD, Llama, fsdp
from torch.utils._python_dispatch import TorchDispatchMode

import fastmorph as fm
from fastmorph.distributed.cost import NETWORKS, OPERATORS_A_TENSOR, OPERATORS_AN_EQUATION, Machine, Sizes, cost_of
from fastmorph.ranks import Ranks

SIZES = Sizes(32, 64, 3, 8, 8, HEAD, 16)


def network():
    torch.manual_seed(0)
    return Llama(SIZES.width, SIZES.heads, SIZES.hidden, SIZES.blocks)


PLANS = {
    "wider": ([fm.Widen("blocks.*.feed.up", "x1.5")], {"factor": 1.5}),
    "deeper": ([fm.Deepen("blocks.*.feed.down")], {"deepen": True}),
}


def counted(plan):
    """Bytes that this rank gets from others, and the child's number of parameters."""
    made = []
    init = Ranks.__init__

    def noted(self, *arguments):
        init(self, *arguments)
        made.append(self)

    Ranks.__init__ = noted
    try:
        parent = network()
        fsdp(parent)
        optimizer = torch.optim.AdamW(parent.parameters(), lr=1e-3)
        parent(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
        optimizer.step()
        inputs = torch.zeros(2, 3, dtype=torch.int64)
        grown = fm.distributed.morph(
            parent, PLANS[plan][0], parallelize=fsdp, optimizer=optimizer, example_inputs=inputs, verify=False
        )
    finally:
        Ranks.__init__ = init
    return made[0].received, sum(parameter.numel() for parameter in grown.model.parameters())


@pytest.mark.parametrize("plan", PLANS)
def test_the_bytes_are_those_of_a_run(two, plan):
    expected = cost_of(SIZES, Machine(ranks=2, itemsize=4), **PLANS[plan][1])
    assert expected.parameters[0] == sum(parameter.numel() for parameter in network().parameters())
    measured = two.run(counted, plan)
    for _, parameters in measured:
        assert parameters == expected.parameters[1]
    received = sum(received for received, _ in measured) / 2  # answers are broadcast: who solves one receives none
    assert received == pytest.approx(expected.received, rel=0.03)


class Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Operators.count += 1
        return func(*args, **(kwargs or {}))


def test_the_operators_are_no_more_than_counted():
    """A tensor more, an equation more: so many operators more at most, whatever a network's following takes."""

    def operators(blocks, plan):
        torch.manual_seed(0)
        parent = Llama(SIZES.width, SIZES.heads, SIZES.hidden, blocks)
        structure = fm.follow(parent, torch.zeros(2, 3, dtype=torch.int64))
        Operators.count = 0
        with Operators():
            fm.morph(parent, plan, structure=structure, verify=False, example_inputs=torch.zeros(2, 3, dtype=torch.int64))
        return Operators.count

    wider = [fm.Widen(f"blocks.{i}.feed.up", 96) for i in (0, 1)]
    assert operators(2, wider) - operators(2, wider[:1]) <= 3 * OPERATORS_A_TENSOR
    equations = [fm.decompose_many([fm.Problem(torch.randn(8, 16), 16, spatial_dims=0)])]
    Operators.count = 0
    with Operators():
        fm.decompose_many([fm.Problem(torch.randn(8, 16), 16, spatial_dims=0)])
    assert equations
    assert 0 < Operators.count <= OPERATORS_AN_EQUATION


def test_figures_follow_from_the_counts():
    assert [round(sizes.parameters / 1e9, 1) for sizes in NETWORKS.values()] == [6.7, 70.6, 405.9]
    machine = Machine()
    for sizes in NETWORKS.values():
        for growth in ({"factor": 1.25}, {"deepen": True}):
            one, many = cost_of(sizes, Machine(ranks=1), **growth), cost_of(sizes, machine, **growth)
            assert one.received == 0
            assert many.held < one.held
            assert many.operations <= math.ceil(sizes.blocks / machine.ranks) / sizes.blocks * one.operations * (1 + 1e-12)
            fast = cost_of(sizes, Machine(bandwidth=math.inf), **growth)
            assert many.seconds - fast.seconds == pytest.approx(many.received / machine.bandwidth)
        assert cost_of(sizes, machine).parameters[0] == cost_of(sizes, machine).parameters[1]


def test_the_command_prints_the_model_and_its_assumptions():
    done = fastmorph("plan-cost", "--world-size", 64, "--bandwidth", 25)
    assert done.status == 0, done.err
    for words in ("64 ranks", "25 GB/s", "7B", "70B", "400B", "feed-forward x1.25", "down projections in two", "a model, not"):
        assert words in done.out
    assert fastmorph("plan-cost", "--world-size", 0).status == 2
