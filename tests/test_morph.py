"""Plans: TOML in and out, morphs run as one, children rebuilt without the parent's weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmorph as fm

PLAN = fm.Plan(
    [
        fm.Deepen("0", hidden_channels=12, kernel_sizes=((5, 5), 3), activation="relu"),
        fm.Deepen("0.first", activation="gelu", norm="batch"),
        fm.Deepen("4"),
    ]
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    return net.eval()


def test_a_plan_goes_through_toml_unchanged(tmp_path):
    PLAN.save(tmp_path / "plan.toml")
    assert fm.Plan.load(tmp_path / "plan.toml") == PLAN
    odd = fm.Plan([fm.Deepen('blocks."x"\\\n.ü')])
    assert fm.Plan.from_toml(odd.to_toml()) == odd
    assert len(fm.Plan.from_toml("")) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[morph", "not valid TOML"),
        ("x = 1", "[[morph]] tables only"),
        ('[[morph]]\noperator = "exec"\nlayer = "0"', "operator = 'exec'"),
        ('[[morph]]\noperator = "deepen"', "needs layer"),
        ('[[morph]]\noperator = "deepen"\nlayer = "0"\nwidth = 3', "width"),
    ],
)
def test_what_is_no_plan_is_refused(text, words):
    with pytest.raises(fm.MorphError) as caught:
        fm.Plan.from_toml(text)
    assert words in str(caught.value)


def test_modules_are_not_written_to_files():
    with pytest.raises(fm.MorphError, match="by its name"):
        fm.Plan([fm.Deepen("0", activation=nn.GELU())]).to_toml()
    with pytest.raises(fm.MorphError, match="is not a morph"):
        fm.Plan(["deepen"])


def test_a_plan_is_run_and_certified(model):
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 12, 12)
    done = fm.morph(model, PLAN, example_inputs=x, calibrate=[x], generator=torch.Generator().manual_seed(0))
    assert done.certificate
    assert done.optimizer is None
    assert [step.layer for step in done.steps] == ["0", "0.first", "4"]
    assert done.steps[0].after == ((12, 3, 5, 5), (8, 12, 3, 3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = fm.morph(model, done.history, calibrate=[x], generator=torch.Generator().manual_seed(0))
    assert again.certificate is None
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, done.model.state_dict()[key])


def test_a_child_is_rebuilt_from_its_plan_and_its_own_weights(model):
    child = fm.morph(model, PLAN).model
    stranger = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    rebuilt = fm.restructure(stranger, PLAN)
    rebuilt.load_state_dict(child.state_dict())
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(rebuilt.eval()(x), child(x), rtol=0, atol=0)
    assert isinstance(stranger[0], nn.Conv2d)


def test_an_inexact_child_is_not_handed_over(model):
    plan = [fm.Deepen("0", hidden_channels=6, kernel_sizes=(3, 3))]
    with pytest.raises(fm.MorphError, match="layer '0'"):
        fm.morph(model, plan)
    x = torch.randn(2, 3, 12, 12)
    done = fm.morph(model, plan, example_inputs=x, allow_inexact=True, solver=fm.General(max_iter=3))
    assert not done.certificate


def test_progress_is_shown_only_when_asked_for(model, capsys):
    fm.morph(model, PLAN)
    assert capsys.readouterr().err == ""
    fm.morph(model, PLAN, progress=True)
    assert "morphing" in capsys.readouterr().err
