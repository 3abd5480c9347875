"""A small network for scikit-learn's images of digits, trained here."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from fastmorph.cli.case import Case, Split, outputs
from fastmorph.cli.child import print_table


def digits_network() -> nn.Sequential:
    """Three convolutions and two linear layers for images (B, 1, 8, 8) of ten digits."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 32, 3, padding=1)),
        ("norm1", nn.BatchNorm2d(32)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(32, 32, 5, padding=2)),
        ("norm2", nn.BatchNorm2d(32)),
        ("relu2", nn.ReLU()),
        ("conv3", nn.Conv2d(32, 64, 3, stride=2, padding=1)),
        ("norm3", nn.BatchNorm2d(64)),
        ("relu3", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(64 * 4 * 4, 64)),
        ("relu4", nn.ReLU()),
        ("fc2", nn.Linear(64, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def digits_case(epochs: int, progress: bool) -> Case:
    """Train on three quarters of scikit-learn's digits; the rest is for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    digits = torch.tensor(data.target, dtype=torch.int64)
    test, train = torch.randperm(len(images)).tensor_split([450])
    network = digits_network()
    began = perf_counter()
    _train(network, images[train], digits[train], epochs, progress)
    print(f"Trained on {len(train)} images of digits for {epochs} epochs, {perf_counter() - began:.1f} s.")

    def accuracy(network: nn.Module) -> float:
        return float((outputs(network, images[test]).argmax(1) == digits[test]).double().mean())

    def report(parent: nn.Module, child: nn.Module) -> None:
        before, after = (outputs(network, images[test]) for network in (parent, child))
        changed = int((before.argmax(1) != after.argmax(1)).sum())
        print(f"Accuracy on {len(test)} test images: {accuracy(parent):.2%} before, {accuracy(child):.2%} after; ", end="")
        print(f"{changed} predictions changed.")

        print("After two more epochs at a small learning rate:")
        rows = [("", "training loss", "test accuracy")]
        for name, network in (("parent", parent), ("child", child)):
            trained = deepcopy(network)
            _train(trained, images[train], digits[train], 2, progress=False, rate=2e-4)
            both = (network, trained)
            losses = [float(cross_entropy(outputs(n, images[train]), digits[train])) for n in both]
            scores = [accuracy(n) for n in both]
            rows.append((name, "{:.5f} -> {:.5f}".format(*losses), "{:.2%} -> {:.2%}".format(*scores)))
        print_table(rows)

    # 5 x 5 as 3 x 3 after 3 x 3: neither holds the weight, so an equation is solved. By Claim 1, 89 channels suffice.
    return Case(
        network,
        "fastmorph.cli.digits:digits_network",
        "conv2",
        Split(96, (3, 3), "3x3 and 3x3"),
        Split(64, (3, 3), "3x3 and 3x3"),
        Split(36, (5, 3), "5x5 and 3x3"),
        images[test],
        (16, 1, 8, 8),
        report,
    )


def _train(network: nn.Module, images: Tensor, digits: Tensor, epochs: int, progress: bool, rate: float = 4e-3) -> None:
    batches = -(-len(images) // 64)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=epochs * batches)
    network.train()
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=not progress):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(network(images[batch]), digits[batch]).backward()
            optimizer.step()
            schedule.step()
