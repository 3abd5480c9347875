"""Sharded networks grow in mid-training, and go on as the same network does in a single process: bit for bit at birth."""

from __future__ import annotations

import pytest
import torch
from sharded_networks import NETWORKS, PLANS, WAYS, batch
from torch import nn
from torch.distributed.tensor import DTensor

import fastmorph as fm


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, optimizer, inputs, targets, steps):
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make(optimizer, parameters):
    if optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2)
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def copy_of(model, optimizer, name, kind):
    """The network and its optimizer in this process alone, with the same bits."""
    alone = NETWORKS[name]()
    names = {key.removeprefix("module."): value for key, value in model.state_dict().items()}
    alone.load_state_dict({key: full(value).clone() for key, value in names.items()})
    own = make(kind, alone.parameters())
    for parameter, other in zip(alone.parameters(), model.parameters(), strict=True):
        state = optimizer.state[other]
        own.state[parameter] = {key: full(value).clone() for key, value in state.items()}
    return alone, own


def grows_as_alone(name, way, child_way, kind):
    shard, shard_child = WAYS[way], WAYS[child_way]
    inputs, targets = batch(NETWORKS[name])
    parent = NETWORKS[name]()
    parent = shard(parent) or parent
    optimizer = make(kind, parent.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    train(parent, optimizer, inputs, targets, 4)
    alone, its_optimizer = copy_of(parent, optimizer, name, kind)
    before = {key: full(value).clone() for key, value in parent.state_dict().items()}

    grown = fm.distributed.morph(
        parent, PLANS[name], parallelize=shard_child, optimizer=optimizer, example_inputs=inputs, generator=7
    )
    assert grown.certificate
    assert grown.rebind(scheduler).last_epoch == scheduler.last_epoch
    after = parent.state_dict()
    assert all(torch.equal(full(after[key]), value) for key, value in before.items()), "the parent is as it was"
    found = {key.removeprefix("module."): full(value).clone() for key, value in grown.model.state_dict().items()}
    assert any(isinstance(p, DTensor) for p in grown.model.parameters()) == (child_way != "ddp")
    states = [
        {key: full(value).clone() for key, value in grown.optimizer.state[parameter].items()}
        for parameter in grown.model.parameters()
    ]
    losses = train(grown.model, grown.optimizer, inputs, targets, 20)
    if torch.distributed.get_rank():
        return 0.0, 1.0

    expected = fm.morph(alone, PLANS[name], optimizer=its_optimizer, example_inputs=inputs, generator=7)
    assert grown.history == expected.history
    wanted = expected.model.state_dict()
    assert found.keys() == wanted.keys()
    differ = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not differ, differ
    for state, parameter in zip(states, expected.model.parameters(), strict=True):
        other = expected.optimizer.state[parameter]
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items())
    expected_losses = train(expected.model, expected.optimizer, inputs, targets, 20)
    return max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)), losses[0] - losses[-1]


def check(processes, *arguments):
    for difference, learned in processes.run(grows_as_alone, *arguments):
        assert difference <= 1e-9
        assert learned > 1e-3, "it trains"


@pytest.mark.parametrize(
    ("name", "way", "child_way", "kind"),
    [
        ("llama", "fsdp", "fsdp", "adamw"),
        ("resnet", "fsdp", "fsdp", "adamw"),
        ("llama", "tensor", "tensor", "adamw"),
        ("resnet", "ddp", "ddp", "sgd"),
        ("mixture", "fsdp", "fsdp", "adamw"),
        ("llama", "nothing", "fsdp", "sgd"),
        ("llama", "fsdp", "tensor", "sgd"),
    ],
)
def test_two_ranks(two, name, way, child_way, kind):
    check(two, name, way, child_way, kind)


@pytest.mark.parametrize(
    ("name", "way", "kind"), [("llama", "fsdp", "adamw"), ("resnet", "fsdp", "adamw"), ("llama", "both", "adamw")]
)
def test_four_ranks(four, name, way, kind):
    check(four, name, way, way, kind)
