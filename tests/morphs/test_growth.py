"""One network grown four times, each time after some real training: every certificate holds, and it keeps learning."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastmorph as fm

sklearn_datasets = pytest.importorskip("sklearn.datasets")


class Network(nn.Module):
    """A stem, a residual block with a squeeze-and-excitation gate, a strided layer and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = self.stem(x)
        inner = self.block(x)
        x = torch.relu(x + inner * self.gate(inner))
        return self.head(torch.relu(self.down(x)).flatten(1))


PLANS = {
    "widen": [fm.Widen("stem.0", 12), fm.Widen("down", 15)],
    "deepen": [fm.Deepen("block.0", hidden_channels=16, activation="relu"), fm.Deepen("head", 24, activation="gelu")],
    "kernel": [fm.GrowKernel("down", 5), fm.GrowKernel("stem.0", (5, 3))],
    "subnet": [
        fm.InsertSubnet(
            "down", fm.Stacked([fm.Sequential([(34, 3, "relu"), (None, 3, None)]), fm.Sequential([(None, 5, None)])])
        ),
        fm.InsertSubnet("gate.1", fm.Residual(8, 1, "relu")),
    ],
}


def batches(epochs):
    digits = sklearn_datasets.load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(1500, generator=shuffle).split(125):
            yield images[rows], labels[rows]


def loss_of(model):
    model.eval()
    with torch.no_grad():
        images, labels = map(torch.cat, zip(*batches(1), strict=True))
        return float(cross_entropy(model(images), labels))


def train(model, optimizer, scheduler, epochs=1):
    model.train()
    for images, labels in batches(epochs):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_it_grows_and_keeps_learning(kind):
    torch.manual_seed(0)
    model = Network()
    optimizer = (
        kind(model.parameters(), lr=2e-3) if kind is torch.optim.AdamW else kind(model.parameters(), lr=0.01, momentum=0.9)
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    train(model, optimizer, scheduler, epochs=2)
    losses = [loss_of(model)]
    for name, plan in PLANS.items():
        inputs = next(batches(1))[0]
        model.eval()
        grown = fm.morph(model, plan, example_inputs=inputs, optimizer=optimizer, generator=torch.Generator().manual_seed(1))
        assert grown.certificate, name
        assert type(grown.model) is Network
        assert sum(p.numel() for p in grown.model.parameters()) > sum(p.numel() for p in model.parameters())
        carried = [p for p in grown.model.parameters() if p in grown.optimizer.state]
        assert carried, name
        assert loss_of(grown.model) == pytest.approx(losses[-1], rel=1e-3)
        model, optimizer, scheduler = grown.model, grown.optimizer, grown.rebind(scheduler)
        train(model, optimizer, scheduler, epochs=2)
        losses.append(loss_of(model))
    assert all(later < earlier for earlier, later in pairwise(losses)), losses
    assert optimizer.param_groups[0]["lr"] < (2e-3 if kind is torch.optim.AdamW else 0.01)
