"""From P-activations to plain ones: the penalty, the schedule, and the fold, exact again."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from modules import DTYPES, layers, randn, set_a
from torch import nn

from fastmorph.errors import MorphError
from fastmorph.nn import (
    ActivationSchedule,
    PActivation,
    activation_penalty,
    fold_activations,
)


def test_penalty_is_over_our_own_activations_once_each():
    shared = set_a(PActivation("relu", channels=4), 0.0, 1.0, 2.0, 1.0)
    model = layers(shared, nn.PReLU(init=7.0), set_a(PActivation("gelu"), 0.5), shared)
    penalty = activation_penalty(model)
    assert penalty.item() == 6 / 4 + 0.25
    penalty.backward()
    assert torch.equal(shared.a.grad, shared.a.detach() / 2)
    assert model[3].weight.grad is None
    assert activation_penalty(layers(nn.PReLU())).item() == 0


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedule_goes_from_where_a_stands_to_exactly_zero(shape, halfway, dtype):
    model = layers(PActivation("relu", channels=4), PActivation("gelu", a=0.5), nn.PReLU()).to(dtype)
    schedule = ActivationSchedule(model, 4, shape)
    seen = [1.0]
    for _ in range(6):
        schedule.step()
        seen.append(model[1].a[2].item())
        torch.testing.assert_close(model[3].a.item(), seen[-1] / 2, rtol=1e-2, atol=0)
    quarter = 0.25 if shape == "linear" else (1 - np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(seen[:4], [1, 1 - quarter, halfway, quarter], rtol=1e-2)
    assert seen[4:] == [0.0, 0.0, 0.0]
    assert model[5].weight.item() == 0.25  # the network's own PReLU


def test_schedule_holds_a_against_the_optimizer():
    model = layers(PActivation("relu"), PActivation("gelu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    def train():
        optimizer.zero_grad()
        model(randn(5, 4)).square().sum().backward()
        optimizer.step()

    model(randn(5, 4)).square().sum().backward()  # a gradient left over from before the schedule
    schedule = ActivationSchedule(model, 2)
    optimizer.step()
    assert model[1].a.item() == model[3].a.item() == 1
    schedule.step()
    before = model[0].weight.clone()
    train()
    assert model[1].a.item() == model[3].a.item() == 0.5
    assert not torch.equal(model[0].weight, before)


def test_schedule_resumes():
    first = layers(PActivation("relu", a=0.8), PActivation("gelu", channels=4))
    schedule = ActivationSchedule(first, 5, "cosine")
    schedule.step()
    schedule.step()
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "schedule": schedule.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    second = layers(PActivation("relu"), PActivation("gelu", channels=4))
    second.load_state_dict(saved["model"])
    resumed = ActivationSchedule(second, 99)
    resumed.load_state_dict(saved["schedule"])
    for _ in range(4):
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)
        schedule.step()
        resumed.step()
    assert not second[1].a.any()
    with pytest.raises(MorphError, match="not the model's"):
        ActivationSchedule(layers(PActivation("relu")), 5).load_state_dict(saved["schedule"])


def test_schedule_refuses_what_it_cannot_do():
    with pytest.raises(MorphError, match="no P-activation"):
        ActivationSchedule(layers(nn.PReLU()), 5)
    with pytest.raises(MorphError, match="at least one step, not 0"):
        ActivationSchedule(layers(PActivation("relu")), 0)
    with pytest.raises(MorphError, match="not 'step'"):
        ActivationSchedule(layers(PActivation("relu")), 5, "step")


def test_fold_is_exact_and_leaves_the_model_alone():
    hardtanh, own = nn.Hardtanh(-2, 2), nn.PReLU(init=0.0)
    fns = ["relu", "gelu", hardtanh, torch.sin, "silu"]
    model = layers(*(PActivation(fn, a=float(fn == "silu"), channels=4) for fn in fns), own)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(module) for module in model]
    folded = fold_activations(model)
    assert [type(m) for m in folded][1:10:2][:3] == [nn.ReLU, nn.GELU, nn.Hardtanh]
    assert folded[5].min_val == -2
    assert type(folded[9]) is nn.Identity
    assert type(folded[11]) is nn.PReLU
    assert not any(isinstance(m, PActivation) for m in folded.modules())
    x = randn(50, 4) * 3
    assert torch.equal(folded(x), model(x))
    assert [type(module) for module in model] == types
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not set(map(id, folded.parameters())) & set(map(id, model.parameters()))


def test_fold_keeps_sharing_and_mode_and_reaches_the_root():
    shared = PActivation("relu", a=0.0)
    model = nn.ModuleDict({"x": nn.Sequential(shared, shared), "y": nn.ModuleList([shared]), "z": None}).eval()
    folded = fold_activations(model)
    assert folded["x"][0] is folded["x"][1] is folded["y"][0]
    assert type(folded["x"][0]) is nn.ReLU
    assert not any(module.training for module in folded.modules())
    assert type(fold_activations(PActivation("gelu"))) is nn.Identity
    assert not fold_activations(PActivation("gelu").eval()).training
    nested = fold_activations(PActivation(PActivation("tanh", a=0.0), a=0.0))
    assert type(nested) is nn.Tanh


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_fold_refuses_the_unfinished(name):
    for values in ((0, 0, 0, 1), (0, 0, 1e-30, 0), (0, float("nan"), 0, 0), (-1, -1, -1, -1)):
        model = layers(PActivation("tanh"), set_a(PActivation(name, channels=4), *values))
        with pytest.raises(MorphError, match=r"3 is unfinished, its a lies in \["):
            fold_activations(model)
        kept = fold_activations(model, strict=False)
        assert type(kept[1]) is nn.Identity
        assert type(kept[3]) is type(model[3])
        assert kept[3] is not model[3]
    small = layers(set_a(PActivation(name, channels=4), 0.0, 1e-3, -1e-3, 0.0))
    assert type(fold_activations(small, atol=2e-3)[1]) in (nn.ReLU, nn.GELU)
    with pytest.raises(MorphError, match=r"\[-0.001, 0.001\]"):
        fold_activations(small, atol=5e-4)
    with pytest.raises(MorphError, match="the model is unfinished"):
        fold_activations(PActivation(name, a=0.5))
