"""Patterns and factors in operators: what they name, what a history holds of them, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmorph as fm
from fastmorph.plan.patterns import expanded


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.norm(self.conv1(x)).relu())


def make_model():
    torch.manual_seed(0)
    stages = [nn.Sequential(*(Block(width) for _ in range(2))) for width in (4, 8)]
    body = nn.Sequential(nn.Conv2d(3, 4, 3), stages[0], nn.Conv2d(4, 8, 1), stages[1])
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def names(pattern, model=None):
    return [operator.layer for operator in expanded(fm.GrowKernel(pattern, 5), model or make_model())]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("0.1.*.conv1", ["0.1.0.conv1", "0.1.1.conv1"]),
        ("0.*.1.conv?", ["0.1.1.conv1", "0.1.1.conv2", "0.3.1.conv1", "0.3.1.conv2"]),
        ("0.[!1].*.conv2", ["0.3.0.conv2", "0.3.1.conv2"]),
        ("**.conv[2]", ["0.1.0.conv2", "0.1.1.conv2", "0.3.0.conv2", "0.3.1.conv2"]),
        ("0.3.**", ["0.3.0.conv1", "0.3.0.conv2", "0.3.1.conv1", "0.3.1.conv2"]),
        ("0.*", ["0.0", "0.2"]),
        ("3", ["3"]),
        ("0.1.*.norm", ["0.1.0.norm", "0.1.1.norm"]),
    ],
)
def test_a_pattern_names_layers_part_by_part(pattern, found):
    assert names(pattern) == found


def test_a_plan_of_patterns_and_factors_is_the_plan_that_it_comes_to():
    parent = make_model()
    short = fm.Plan([fm.Widen("**.conv1", "x1.5"), fm.Deepen("0.[02]", "x4"), fm.GrowKernel("0.1.*.conv2", 5)], seed=3)
    written = fm.Plan(
        [
            *(fm.Widen(name, 9) for name in ("0.1.0.conv1", "0.1.1.conv1", "0.3.0.conv1", "0.3.1.conv1")),
            fm.Deepen("0.0", 16),
            fm.Deepen("0.2", 32),
            *(fm.GrowKernel(f"0.1.{block}.conv2", 5) for block in range(2)),
        ],
        seed=3,
    )
    grown, expected = (fm.morph(parent, plan, example_inputs=X) for plan in (short, written))
    assert grown.history == expected.history
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, grown.model.state_dict()[name])
    again = fm.restructure(make_model(), fm.Plan.from_toml(short.to_toml()), example_inputs=X)
    again.load_state_dict(grown.model.state_dict())
    assert len(grown.steps) == len(written)


def test_layers_of_one_stream_get_one_width():
    child = fm.widen(make_model(), {"0.1.*.conv2": "x1.5"}, example_inputs=X)
    assert [child.get_submodule(name).out_channels for name in ("0.0", "0.1.0.conv2", "0.1.1.conv2")] == [6, 6, 6]
    assert child.get_submodule("0.3.0.conv2").out_channels == 8


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (fm.Widen("0.9.*.conv1", 8), "no layer's name matches '0.9.*.conv1'"),
        (fm.Widen("0.1.0.conv1", "1.5"), "neither a number nor a factor"),
        (fm.Widen("0.1.0.conv1", "x0.5"), "neither a number nor a factor"),
        (fm.Widen("0.1.0.conv9", "x2"), "has no layer '0.1.0.conv9'"),
        (fm.Widen("0.1.0.norm", "x2"), "of no number of channels"),
        (fm.Deepen("**.conv1", "x0.1"), "neither a number nor a factor"),
        (fm.Widen("**.norm", 8), "'0.1.0.norm'"),
    ],
)
def test_what_names_nothing_is_refused(operator, message):
    parent = make_model()
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    with pytest.raises(fm.MorphError) as error:
        fm.morph(parent, operator, example_inputs=X)
    assert message in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())
