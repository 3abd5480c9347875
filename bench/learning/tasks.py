"""What is learnt: for each task a parent, the plan that grows it, batches in a fixed order, and a score, higher is better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmorph as fm
from bench.learning import data

_BATCH = 64


class Images:
    """Classes of images; the score is the accuracy in percent, on a quarter of the test images unless all are asked for."""

    def __init__(self, count: int, tests: int) -> None:
        self.count, self.tests = count, tests

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Batch `step` of all epochs."""
        epoch, place = divmod(step, self.count // _BATCH)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        rows = order[place * _BATCH : (place + 1) * _BATCH]
        x, y = data.images("train", self.count)
        return x[rows], y[rows]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def score(self, model: nn.Module, whole: bool = True) -> float:
        x, y = data.images("t10k", self.tests if whole else self.tests // 4)
        right = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500), strict=True))
        return 100 * right / len(y)


class Text:
    """The next character of a text; the score is the negative of the loss in bits a character, on a quarter likewise."""

    def __init__(self, tests: int, length: int = 32) -> None:
        self.tests, self.length = tests, length

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        learnt, _, _ = data.text()
        generator = torch.Generator().manual_seed(1_000_000 * seed + step)
        starts = torch.randint(len(learnt) - self.length - 1, (_BATCH // 2,), generator=generator)
        rows = learnt[starts[:, None] + torch.arange(self.length + 1)]
        return rows[:, :-1], rows[:, 1:]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, whole: bool = True) -> float:
        _, asked, _ = data.text()
        tests = self.tests if whole else self.tests // 4
        rows = asked[: tests * (self.length + 1)].reshape(tests, -1)
        return -float(self.loss(model, rows[:, :-1], rows[:, 1:])) / 0.6931471805599453


# --- networks -----------------------------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def quick() -> nn.Module:
    """Three convolutions with pools between them, in the manner of cifar10_quick."""
    pool = nn.MaxPool2d(2)
    return nn.Sequential(*(*_conv(1, 8), pool, *_conv(8, 16), pool, *_conv(16, 24), nn.Flatten(), nn.Linear(216, 10)))


def vgg() -> nn.Module:
    """Two convolutions a stage, three stages."""
    stages = [_conv(a, b) + _conv(b, b) + [nn.MaxPool2d(2)] for a, b in ((1, 8), (8, 16), (16, 24))]
    return nn.Sequential(*(part for stage in stages for part in stage), nn.Flatten(), nn.Linear(24, 10))


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def resnet() -> nn.Module:
    """A residual network of three stages."""
    blocks = [Block(8, 8, 2), Block(8, 16, 2), Block(16, 24, 2)]
    return nn.Sequential(*_conv(1, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


class Layer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (part(normed).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small language model of characters."""

    def __init__(self, width: int = 32, heads: int = 4, inner: int = 32, layers: int = 2, length: int = 32) -> None:
        super().__init__()
        _, _, kinds = data.text()
        self.embed, self.place = nn.Embedding(kinds, width), nn.Embedding(length, width)
        nn.init.normal_(self.embed.weight, std=0.1)
        nn.init.normal_(self.place.weight, std=0.1)
        self.blocks = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, kinds)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# --- tasks --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A parent, its growth, and what both learn."""

    name: str
    make: Any
    data: Any
    steps: int  # of the parent, and of the child after it
    rate: float
    wider: tuple[tuple[str, int | str], ...]
    deeper: tuple[str, ...]
    blocks: tuple[str, ...] = ()

    def plan(self, fill: str = "pair", deepen: bool = True) -> list[fm.Operator]:
        """The growth: first wider, then deeper. Blocks that follow a `fill` that blocks do not have are pairs."""
        widths = [fm.Widen(layer, channels, fill) for layer, channels in self.wider]
        blocks = [fm.InsertBlock(name, fill="zero" if fill == "zero" else "pair") for name in self.blocks]
        return [*widths, *blocks, *(fm.Deepen(layer, "x1.25", activation="relu") for layer in self.deeper if deepen)]

    def batches(self, seed: int, start: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.data.batch(seed, step) for step in range(start, start + steps))


def tasks(quick_run: bool = False) -> dict[str, Task]:
    """All of them, by name; of a size for seconds, if `quick_run`."""
    pictures = Images(640, 500) if quick_run else Images(60_000, 10_000)
    letters = Text(16) if quick_run else Text(512)
    steps = 20 if quick_run else 1000
    found = [
        Task("quick", quick, pictures, steps, 2e-3, (("0", 24), ("4", 48), ("8", 64)), ("8",)),
        Task("text", Transformer, letters, steps, 2e-3, (("blocks.*.up", "x4"),), (), ("blocks.0", "blocks.1")),
        Task("resnet", resnet, pictures, steps, 2e-3, (("0", 16), ("*.conv1", "x2"), ("[345].conv2", "x2")), ("*.conv2",)),
        Task(
            "vgg",
            vgg,
            pictures,
            steps,
            2e-3,
            (("0", 16), ("3", 16), ("7", 32), ("10", 32), ("14", 48), ("17", 48)),
            ("3", "10", "17"),
        ),
    ]
    return {task.name: task for task in found}
