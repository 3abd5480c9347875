"""A plan in a file: read, carried out, written back with its seed, and replayed to the same bits somewhere else."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import fastmorph as fm

PLAN = """
[[morph]]
operator = "widen"
layer = "0"
channels = 24

[[morph]]
operator = "deepen"
layer = "2"
hidden_channels = 40
kernel_sizes = [3, 3]
activation = "relu"
"""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32))


with TemporaryDirectory() as folder:
    path = Path(folder) / "plan.toml"
    path.write_text(PLAN)
    parent = network().eval()
    grown = fm.morph(parent, fm.Plan.load(path), example_inputs=torch.randn(2, 3, 16, 16))
    print(grown.certificate)

    grown.history.save(path)  # with the seed of all noise
    again = fm.morph(parent, fm.Plan.load(path), example_inputs=torch.randn(2, 3, 16, 16)).model
    assert all(torch.equal(one, two) for one, two in zip(grown.model.parameters(), again.parameters(), strict=True))

    torch.save(grown.model.state_dict(), Path(folder) / "child.pt")  # later: the architecture, then its weights
    child = fm.restructure(network(), fm.Plan.load(path))
    child.load_state_dict(torch.load(Path(folder) / "child.pt", weights_only=True))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(child.eval()(x), grown.model(x))
