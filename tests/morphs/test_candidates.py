"""The table of what can grow: each entry of it works, each refusal is one, the cost is what is then there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmorph as fm


class Net(nn.Module):
    """A stream with a block, a grouped layer, a group norm, a weight that the forward reads, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.norm, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1)
        self.groupnorm, self.mid, self.last = nn.GroupNorm(3, 12), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 4, 1)
        self.up = nn.ConvTranspose2d(4, 5, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.norm(self.a(x)).relu())
        x = self.groupnorm(self.point(self.depthwise(x))).relu()
        return self.head(self.up(self.last(self.mid(x))).mean((2, 3))) + self.last.weight.norm()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
MORPHS = {
    "deepen": lambda row: fm.Deepen(row.layer),
    "insert_subnet": lambda row: fm.InsertSubnet(row.layer, fm.Sequential([(2 * row.channels + 64, 1, None), (None, 3, None)])),
    "grow_kernel": lambda row: fm.GrowKernel(row.layer, 6 if "Transpose" in row.kind else 5),
    "widen": lambda row: fm.Widen(row.layer, row.channels + max(1, row.step)),
}


def count(model):
    return sum(tensor.numel() for tensor in model.state_dict().values())


def test_every_entry_of_the_table_holds():
    torch.manual_seed(0)
    parent = Net().eval()
    found = fm.candidates(parent, X)
    assert [row.layer for row in found] == ["stem", "a", "b", "depthwise", "point", "mid", "last", "up", "head"]
    for row in found:
        for name, make in MORPHS.items():
            if name in row.operators:
                child = fm.morph(parent, make(row), example_inputs=X).model
                if name == "widen":
                    buffers = sum(1 for n, _ in parent.named_buffers() if "num_batches" in n)
                    assert buffers == 1
                    grown = sum(t.numel() for t in child.state_dict().values()) - sum(
                        t.numel() for t in parent.state_dict().values()
                    )
                    assert row.cost == grown
                    assert row.step == child.get_submodule(row.layer).weight.shape["Transpose" in row.kind] - row.channels
            else:
                with pytest.raises(fm.MorphError):
                    fm.morph(parent, make(row), example_inputs=X)


def test_what_the_table_says():
    torch.manual_seed(0)
    found = {row.layer: row for row in fm.candidates(Net(), X)}
    assert found["b"].coupled == ("stem", "depthwise")
    assert found["point"].step == 4  # whole groups of the norm
    assert found["head"].step == 0
    assert "model's output" in " ".join(found["head"].refused)
    assert "reads its weight besides calling it" in " ".join(found["last"].refused)
    table = str(fm.candidates(Net(), X))
    assert "point      Conv2d 1x1           12        yes     yes     yes     4         -" in table
    assert "'head' cannot get more channels" in table


def test_a_structure_serves_and_another_model_s_is_refused():
    parent = Net()
    structure = fm.follow(parent, X)
    assert list(fm.candidates(parent, structure=structure)) == list(fm.candidates(parent, X))
    with pytest.raises(fm.MorphError, match="not this model's"):
        fm.candidates(nn.Linear(3, 4), structure=structure)


def test_a_layer_that_computes_its_weight_is_one_row():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm(nn.Conv2d(6, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    found = fm.candidates(model, X)
    assert [(row.layer, row.channels, row.step) for row in found] == [("0", 6, 1), ("1", 4, 1), ("3", 2, 0)]
    child = fm.widen(model, {"1": 5}, example_inputs=X)
    assert child[3].in_channels == 5
