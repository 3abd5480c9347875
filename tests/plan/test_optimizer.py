"""An optimizer carried over goes on where the parent's stood: options, moments, step counts and schedules."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastmorph as fm
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.optimizers import carry_over

PLAN = [
    fm.GrowKernel("0", 4),
    fm.Deepen("2", activation="relu", norm="batch"),
    fm.InsertSubnet("4", fm.Residual(4)),
    fm.Deepen("2.first"),
    fm.GrowKernel("0.conv", 5),
]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), betas=(0.8, 0.9), weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1)
    net = nn.Sequential(conv, nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 5, bias=False))
    net[5].weight = nn.Parameter(net[5].weight.detach().clone(), requires_grad=False)
    return net.double()


def groups(model):
    """Two groups of their own options, and a parameter that is not the model's."""
    outside = nn.Parameter(torch.ones(3, dtype=torch.float64))
    return [
        {"params": [p for name, p in model.named_parameters() if "bias" not in name and p.requires_grad], "lr": 0.02},
        {"params": [*(p for name, p in model.named_parameters() if "bias" in name), outside], "weight_decay": 0.5},
        {"params": [model[5].weight]},
    ]


def step(model, optimizer, seed):
    """One step, on the same data for the same seed."""
    x = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    own = set(model.parameters())
    outside = [p for group in optimizer.param_groups for p in group["params"] if p not in own]
    (model(x).square().mean() + sum((p * seed).sum() for p in outside)).backward()
    optimizer.step()


def trained(model, name, steps=3):
    optimizer = OPTIMIZERS[name](groups(model))
    for seed in range(steps):
        step(model, optimizer, seed + 1)
    return optimizer


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict()), [list(map(id, group["params"])) for group in optimizer.param_groups]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_it_would_have(model, name):
    """One more step of parent and child: what was there before moves by as much in both."""
    optimizer = trained(model, name)
    state, held = snapshot(optimizer)
    grown = fm.morph(model, [fm.GrowKernel("0", 5)], optimizer=optimizer)
    assert snapshot(optimizer)[1] == held
    assert str(snapshot(optimizer)[0]) == str(state)
    assert type(grown.optimizer) is type(optimizer)
    step(model, optimizer, 9)
    step(grown.model, grown.optimizer, 9)
    child = dict(grown.model.named_parameters())
    for key, parent in model.named_parameters():
        inner = child[key][:, :, 1:-1, 1:-1] if key == "0.weight" else child[key]
        torch.testing.assert_close(inner, parent, rtol=0, atol=1e-10)
    assert child["0.weight"][:, :, 0].count_nonzero(), "the new taps learn"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_of_the_child_is_in_one_group_with_its_options(model, name):
    optimizer = trained(model, name)
    outside = optimizer.param_groups[1]["params"][-1]
    grown = fm.morph(model, PLAN, optimizer=optimizer)
    held = [p for group in grown.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for p in held} == {id(p) for p in [*grown.model.parameters(), outside]}
    decays = bool(optimizer.param_groups[0]["weight_decay"])
    same = [*optimizer.param_groups, *([{**optimizer.param_groups[0], "weight_decay": 0}] if decays else [])]
    for old, new in zip(same, grown.optimizer.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {k: v for k, v in new.items() if k != "params"}
    first, second, third, *twin = ({id(p) for p in group["params"]} for group in grown.optimizer.param_groups)
    child = grown.model
    assert {id(child[0].conv.conv.weight), id(child[2].first.first.weight), id(child[2].norm.bias)} <= first
    assert twin == ([{id(child[2].activation.a)}] if decays else []), "a never decays"
    assert decays or id(child[2].activation.a) in first
    assert {id(child[2].second.bias), id(child[4].layer.bias), id(outside)} == second - {id(child[0].conv.conv.bias)}
    assert third == {id(child[5].weight)}
    assert not child[5].weight.requires_grad
    assert all(
        state["step"] == 3 for p, state in grown.optimizer.state.items() if p is child[4].layer.weight and "step" in state
    )
    step(child, grown.optimizer, 5)


def test_new_layers_start_afresh(model):
    optimizer = trained(model, "adam")
    grown = fm.morph(model, PLAN, optimizer=optimizer)
    child, state = grown.model, grown.optimizer.state
    assert child[2].first.second.weight not in state
    assert child[4].residual[1].first.weight not in state
    assert state[child[2].second.bias]["step"] == 3
    assert state[child[4].layer.weight]["exp_avg"].equal(optimizer.state[model[4].weight]["exp_avg"])
    assert state[child[4].layer.weight]["exp_avg"] is not optimizer.state[model[4].weight]["exp_avg"]
    moment = state[child[0].conv.conv.weight]["max_exp_avg_sq"]
    assert moment[:, :, :3, :3].equal(optimizer.state[model[0].weight]["max_exp_avg_sq"])
    assert moment.count_nonzero() == model[0].weight.numel()


def test_a_step_count_never_stands_without_its_moments():
    """Adam with an old count and an empty second moment would divide by next to nothing."""
    model = nn.Linear(3, 3, bias=False)
    for kind, kept in ((torch.optim.Adam, False), (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), True)):
        optimizer = kind(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        child = copy.deepcopy(model)
        lineage = Lineage([(child.weight, model.weight)])
        new = nn.Parameter(child.weight.detach().clone())
        lineage.replaced(child.weight, new, torch.neg, None)
        child.weight = new
        carried, _ = carry_over(optimizer, child, lineage)
        assert (new in carried.state) is kept
        if kept:
            assert carried.state[new]["momentum_buffer"].equal(-optimizer.state[model.weight]["momentum_buffer"])


def test_tied_weights_and_named_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.named_parameters())
    model[:2](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    grown = fm.morph(model, [fm.GrowKernel("2", 3)], optimizer=optimizer)
    assert grown.model[1].weight is grown.model[0].weight
    (group,) = grown.optimizer.param_groups
    assert group["param_names"] == [name for name, _ in grown.model.named_parameters()]
    assert group["params"] == list(grown.model.parameters())


def test_hooks_of_the_optimizer_stay(model):
    calls, optimizer = [], trained(model, "sgd")
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step(model, fm.morph(model, [], optimizer=optimizer).optimizer, 1)
    assert calls == [1]


# --- schedulers --------------------------------------------------------------------------------------------------------------


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch, k=k: k / (1 + epoch) for k in (1, 2, 3)]),
    "multiply": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda epoch, k=k: k for k in (0.9, 0.8, 0.7)]),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02, 0.03], [0.1, 0.2, 0.3], base_momentum=[0.7, 0.8, 0.85]),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2), lr_scheduler.PolynomialLR(o, 8)]),
    "cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2, 0.3], total_steps=20),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[1e-3, 2e-3, 1e-4]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("before", [0, 4])
def test_a_rebound_scheduler_drives_the_child_as_the_old_one_would_have(model, name, before):
    optimizer = trained(model, "momentum", steps=0)
    scheduler = SCHEDULERS[name](optimizer)
    arguments = (1.0,) if name == "plateau" else ()
    for seed in range(before):
        step(model, optimizer, seed)
        scheduler.step(*arguments)
    grown = fm.morph(model, PLAN, optimizer=optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    new = grown.rebind(scheduler)
    assert new.optimizer is grown.optimizer
    assert scheduler.optimizer is optimizer
    assert [group["lr"] for group in grown.optimizer.param_groups] == [*rates, rates[0]], "the last is the first one's twin"
    for seed in range(5):
        for network, driver in ((model, scheduler), (grown.model, new)):
            step(network, driver.optimizer, seed)
            driver.step(*arguments)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert [group["lr"] for group in grown.optimizer.param_groups] == [*rates, rates[0]]
        assert [g.get("momentum") for g in grown.optimizer.param_groups][3] == optimizer.param_groups[0]["momentum"]


def test_a_rebound_scheduler_still_warns_of_the_wrong_order(model):
    optimizer = trained(model, "sgd", steps=0)
    scheduler = fm.morph(model, [], optimizer=optimizer).rebind(lr_scheduler.StepLR(optimizer, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step()
    assert "before `optimizer.step()`" in str(caught[0].message)


def test_what_cannot_be_rebound_is_refused(model):
    scheduler = lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    with pytest.raises(fm.MorphError, match="no optimizer"):
        fm.morph(model, []).rebind(scheduler)
    with pytest.raises(fm.MorphError, match="1 parameter groups, the child's optimizer has 3"):
        fm.morph(model, [], optimizer=trained(model, "sgd")).rebind(scheduler)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_keeps_parameters_elsewhere_is_refused(model):
    with pytest.raises(fm.MorphError, match="LBFGS cannot be carried over: it keeps parameters in its attribute '_params'"):
        fm.morph(model, PLAN, optimizer=torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_of_another_model_is_refused(model):
    with pytest.raises(fm.MorphError, match="none of the model's parameters"):
        fm.morph(model, PLAN, optimizer=torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1))
