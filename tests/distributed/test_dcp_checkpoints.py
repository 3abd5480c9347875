"""Checkpoints of torch.distributed.checkpoint: two ranks save, one process without a group grows, four ranks load and go on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import fastmorph, refuses
from sharded_networks import PLANS, batch, fsdp, llama, resnet
from test_sharded_growth import full, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import fastmorph as fm

X, TARGETS = batch(llama)


def optimizer_of(model):
    """As trainers make it: no weight decay of vectors."""
    parameters = list(model.parameters())
    decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1}
    return torch.optim.AdamW([decayed, {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}], lr=1e-2)


def trained(model):
    optimizer = optimizer_of(model)
    train(model, optimizer, X, TARGETS, 3)
    return optimizer


def save(path, flat):
    model = llama()
    fsdp(model)
    optimizer = trained(model)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"model": get_model_state_dict(model), "optim": state, "step": 3}, checkpoint_id=path)
    weights = {name: full(value).clone() for name, value in model.state_dict().items()}
    moments = [{key: full(value).clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    return (weights, moments) if torch.distributed.get_rank() == 0 else None


def load(path, flat):
    model = llama()
    for plan in fm.distributed.checkpoint_plans(path):
        model = fm.restructure(model, plan, example_inputs=X)
    fsdp(model)
    optimizer = optimizer_of(model)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
        "step": 0,
    }
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
    weights = {name: full(value).clone() for name, value in model.state_dict().items()}
    return weights, train(model, optimizer, X, TARGETS, 10), state["step"]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_save_one_process_grows_four_load(two, four, tmp_path, flat):
    weights, moments = two.run(save, str(tmp_path / "parent"), flat)[0]
    history = fm.distributed.grow_checkpoint(
        tmp_path / "parent", tmp_path / "child", llama, PLANS["llama"], example_inputs=X, generator=7
    )
    assert fm.distributed.checkpoint_plans(tmp_path / "child") == (history,)
    assert fm.distributed.checkpoint_plans(tmp_path / "parent") == ()

    parent = llama()
    parent.load_state_dict(weights)
    optimizer = optimizer_of(parent)
    for parameter, state in zip(parent.parameters(), moments, strict=True):
        optimizer.state[parameter] = state
    expected = fm.morph(parent, PLANS["llama"], example_inputs=X, optimizer=optimizer, generator=7)
    assert history == expected.history
    wanted = {key: value.clone() for key, value in expected.model.state_dict().items()}
    losses = train(expected.model, expected.optimizer, X, TARGETS, 10)
    for found, found_losses, step in four.run(load, str(tmp_path / "child"), flat):
        assert step == 3, "what else is there is copied"
        assert found.keys() == wanted.keys()
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
        assert found_losses == pytest.approx(losses, rel=0, abs=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_grows_again_and_others_are_refused(tmp_path):
    parent = resnet()
    dcp.save(parent.state_dict(), checkpoint_id=tmp_path / "0")
    images, _ = batch(resnet)
    for number, plan in enumerate((PLANS["resnet"][:2], PLANS["resnet"][2:])):
        fm.distributed.grow_checkpoint(
            tmp_path / str(number), tmp_path / str(number + 1), resnet, plan, example_inputs=images, generator=number
        )
    child = parent
    for number, plan in enumerate((PLANS["resnet"][:2], PLANS["resnet"][2:])):
        child = fm.morph(child, plan, example_inputs=images, generator=number).model
    assert fm.distributed.checkpoint_plans(tmp_path / "2") == fm.history(child)
    state = {key: torch.empty_like(value) for key, value in child.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "2")
    assert all(torch.equal(value, child.state_dict()[key]) for key, value in state.items())
    for source, network, words in (
        (tmp_path, resnet, "is no directory that torch.distributed.checkpoint wrote"),
        (tmp_path / "0", llama, "is not the network's: it has no 'embedding.weight'"),
        (tmp_path / "0", lambda: torch.nn.ModuleDict({"stem": torch.nn.Linear(2, 2)}), "'stem.weight' has the shape"),
    ):
        with pytest.raises(fm.MorphError, match=words):
            fm.distributed.grow_checkpoint(source, tmp_path / "new", network, [])
    with pytest.raises(fm.MorphError, match="is not empty"):
        fm.distributed.grow_checkpoint(tmp_path / "0", tmp_path / "1", resnet, [])


def network_for_the_command():
    return resnet()


@pytest.mark.filterwarnings("ignore")
def test_the_command_grows_a_directory(tmp_path):
    dcp.save({"model": resnet().state_dict()}, checkpoint_id=tmp_path / "parent")
    images, _ = batch(resnet)
    fm.Plan(PLANS["resnet"], seed=5).save(tmp_path / "plan.toml")
    words = ("--model", f"{__name__}:network_for_the_command", "--plan", tmp_path / "plan.toml")
    ran = fastmorph("grow", tmp_path / "parent", tmp_path / "child", *words, "--input-shape", "6,3,6,6")
    assert ran.status == 0, ran.err
    assert 'operator = "insert_subnet"' in ran.out
    child = fm.morph(resnet(), PLANS["resnet"], example_inputs=images, generator=5).model
    state = {"model": {key: torch.empty_like(value) for key, value in child.state_dict().items()}}
    dcp.load(state, checkpoint_id=tmp_path / "child")
    assert all(torch.equal(value, child.state_dict()[key]) for key, value in state["model"].items())
    refuses(fastmorph("grow", tmp_path, tmp_path / "new", *words), "is no directory that torch.distributed.checkpoint wrote")
