"""Grow a network in the middle of its training: the loss goes on from where it stood, and so does the optimizer."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastmorph as fm


def batches(count: int, seed: int):
    """Images of one bright quadrant each; the label says which."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(4, (32,), generator=generator)
        images = torch.randn(32, 1, 8, 8, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 1.0
        yield images, labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> float:
    """Returns the mean loss of the last ten steps."""
    losses = []
    model.train()
    for images, labels in batches(steps, seed):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


torch.manual_seed(0)
model: nn.Module = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(16 * 4 * 4, 4)),
)
optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
before = train(model, optimizer, 60, seed=1)

plan = fm.Plan([fm.Widen("0", 12), fm.Widen("2", 24), fm.Deepen("2", hidden_channels=32, activation="relu")])
grown = fm.morph(model, plan, example_inputs=torch.randn(2, 1, 8, 8), optimizer=optimizer)
print(grown.certificate.verdict)

assert grown.optimizer is not None
after = train(grown.model, grown.optimizer, 60, seed=2)
print(f"loss before growing: {before:.3f}, sixty steps after: {after:.3f}")
assert after < before
