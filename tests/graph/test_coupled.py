"""Which tensors share channels: the table that `coupled` prints, and what the trace follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from widening import Net, randn, trained

import fastmorph as fm
from fastmorph.graph import coupled


def network():
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 2)
        )
    )


def test_the_table():
    table = coupled(network(), "0", randn(2, 3, 8, 8))
    assert str(table).splitlines() == [
        "parameter       dim  size  shared  role",
        "0.weight        0    4     4       makes",
        "0.bias          0    4     4       follows",
        "1.weight        0    4     4       follows",
        "1.bias          0    4     4       follows",
        "3.weight        0    4     4       makes",
        "3.bias          0    4     4       follows",
        "5.weight        1    64    64      reads",
        "1.running_mean  0    4     4       follows",
        "1.running_var   0    4     4       follows",
        "'0' has 4 output channels and grows in steps of 1.",
    ]


def test_what_is_fixed():
    table = coupled(network(), "5", randn(2, 3, 8, 8))
    assert table.step == 0
    assert table.fixed == ("they are the model's output",)
    assert "Some of them are fixed: they are the model's output." in str(table)
    norm = trained(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    assert coupled(norm, "0").fixed == ("'1' normalises over them, and whole multiples alone work",)


def test_parts_of_a_concatenation():
    model = trained(Net(lambda m, x: m.two(torch.cat([x, m.one(x)], 1)), one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(7, 2, 1)))
    rows = {(row.name, row.dim): (row.size, row.shared) for row in coupled(model, "one", randn(2, 3, 5, 5)).rows}
    assert rows["two.weight", 1] == (7, 4)


def test_nothing_is_computed_or_changed():
    """A model of any size, and one that PyTorch has no memory for."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 18), nn.ReLU(), nn.Linear(1 << 18, 8))
    assert coupled(model, "0", torch.zeros(1, 1 << 20)).rows[0].size == 1 << 18


def test_modes_and_generators_are_left_alone():
    model, state = network().train(), torch.get_rng_state()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    coupled(model, "0", randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_one_tensor_may_stand_for_the_inputs():
    assert coupled(network(), "0", (randn(2, 3, 8, 8),)) == coupled(network(), "0", randn(2, 3, 8, 8))
    with pytest.raises(fm.MorphError, match="does not run on the example inputs"):
        coupled(network(), "0", randn(2, 4, 8, 8))
