"""The recipes of CONTRIBUTING.md: what tests/outside/ adds works everywhere, and the page shows what stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from outside.layer import MaskedConv2d
from outside.morphs import Factor
from outside.rule import scale_shift
from outside.solver import Singular
from torch import nn

import fastmorph as fm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_a_solver():
    weight = torch.randn(3, 6, 9, dtype=torch.float64)  # a batch of three
    found = fm.decompose(weight, 8, spatial_dims=0, solver=Singular())
    assert isinstance(found.solver, Singular)
    assert float(found.residual.max()) < 1e-14
    parent = nn.Sequential(nn.Linear(9, 6), nn.ReLU()).double()
    assert fm.deepen(parent, "0", hidden_channels=8, solver=Singular())[0].first.out_features == 8
    with pytest.raises(fm.MorphError, match="is for linear layers"):
        fm.decompose(torch.randn(2, 2, 3, 3), 4, solver=Singular())


def test_a_morph():
    parent = nn.Sequential(nn.Linear(5, 8), nn.Tanh()).double()
    plan = fm.Plan.from_toml(
        '[[morph]]\noperator = "outside.factor"\nwhere = "0"\n[morph.between]\nkind = "outside.between"\nchannels = 9'
    )
    assert plan.operators == (Factor("0", plan.operators[0].between),)
    assert fm.morph(parent, plan, example_inputs=torch.randn(4, 5, dtype=torch.float64)).certificate


def test_a_rule():
    class Shifted(nn.Module):
        def forward(self, x):
            return scale_shift(x, 2.0, 1.0)

    parent = nn.Sequential(nn.Linear(5, 6), Shifted(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    for fill in ("pair", "zero", "duplicate"):
        grown = fm.morph(parent, [fm.Widen("0", 9, fill)], example_inputs=x)
        assert grown.certificate
        assert torch.allclose(grown.model(x), parent(x), rtol=0, atol=1e-13)


def test_a_layer_class():
    parent = nn.Sequential(MaskedConv2d(2, 3, 3, padding=1, dtype=torch.float64), nn.ReLU())
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64)
    for child in (fm.deepen(parent, "0", hidden_channels=8), fm.grow_kernel(parent, {"0": 5})):
        assert torch.allclose(child(x), parent(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["solver", "rule", "layer"])
def test_the_page_shows_what_stands_in_the_files(name):
    shown = re.search(rf"`tests/outside/{name}\.py`.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]
    source = (ROOT / "tests" / "outside" / f"{name}.py").read_text(encoding="utf-8")
    assert shown.strip() in source


def test_every_path_that_the_page_names_is_there():
    for path in re.findall(r"`((?:fastmorph|kernels|tests|bench|examples)/[\w/.*]*)`", PAGE):
        assert list(ROOT.glob(path.rstrip("/"))), path
