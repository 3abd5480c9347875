"""Plans of one to four operators for a network, and the circumstances of the call; all of it decided by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastmorph as fm
from tests.fuzz.grammar import HEAD
from tests.fuzz.source import race

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WIDENED = (*CONVS, *TRANSPOSED, nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Bilinear)
CONTEXTS: dict[str, Callable[[], Any]] = {
    "": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "channels last": nullcontext,  # of the parent: see `growths`
}


@dataclass(frozen=True)
class Circumstances:
    """How `fm.morph` is called.

    Attributes:
        inputs: with example inputs.
        options: with optional ones among them.
        verify: with a certificate.
        optimizer: with one of this name.
        replay: whether its history is replayed and restructured.
        context: what the caller's process is set to, one of `CONTEXTS`.
        consume: whether the parent is consumed.
        followed: with a structure that was followed before.
    """

    inputs: bool
    options: bool
    verify: bool
    optimizer: str | None
    replay: bool
    context: str
    consume: bool
    followed: bool


@dataclass(frozen=True)
class _Target:
    """A layer as the operators before it left it."""

    name: str
    channels: int
    inputs: int
    kernel: tuple[int, ...]
    groups: int
    transposed: bool
    deepens: bool


def circumstances(seed: int) -> Circumstances:
    draw = random.Random(f"{seed}.circumstances")
    inputs, options, verify = draw.random() < 0.65, draw.random() < 0.5, draw.random() < 0.4
    optimizer = draw.choice([None] * 12 + ["SGD", "Adam", "AdamW"])
    replay, context = draw.random() < 0.25, draw.choice([""] * 20 + list(CONTEXTS))
    return Circumstances(inputs, options, verify, optimizer, replay, context, draw.random() < 0.06, draw.random() < 0.06)


def plan(seed: int, model: nn.Module, mode: str, steps: Collection[int] | None = None) -> list[Any]:
    """The operators of a seed for a model; `steps` are the numbers of those that stay, all if None."""
    targets = {name: _target(name, module) for name, module in model.named_modules() if isinstance(module, WIDENED)}
    operators: list[Any] = []
    for step in range(random.Random(f"{seed}.steps").choice([1, 1, 1, 1, 2, 2, 3, 4])):
        if not targets:
            break
        target = targets[race(f"{seed}.{step}", {name: _weight(name) for name in targets})]
        if steps is None or step in steps:
            operators.append(_operator(random.Random(f"{seed}.{step}.operator"), target, mode, targets))
    return operators


def _weight(name: str) -> float:
    """How often a layer is chosen: the head, whose channels are outputs, seldom; what a piece was put behind, often."""
    return 0.2 if name.startswith(f"layer{HEAD}") else 3.0 if name.startswith("narrow") else 1.0


def _target(name: str, module: Any) -> _Target:
    def size(*keys: str) -> int:
        return next(getattr(module, key) for key in keys if hasattr(module, key))

    co = size("out_channels", "out_features", "embedding_dim")
    ci = size("in_channels", "in_features", "in1_features", "num_embeddings")
    kernel, groups = getattr(module, "kernel_size", ()), getattr(module, "groups", 1)
    return _Target(name, co, ci, kernel, groups, isinstance(module, TRANSPOSED), isinstance(module, (*CONVS, nn.Linear)))


def _operator(draw: random.Random, target: _Target, mode: str, targets: dict[str, _Target]) -> Any:
    kinds = ["widen"] * 5
    if target.deepens:
        kinds += ["deepen"] * 3 + ["sequential", "stacked", "residual"]
    if target.kernel:
        kinds += ["grow"] * 3
    return _OPERATORS[draw.choice(kinds)](draw, target, mode, targets)


def _widen(draw: random.Random, target: _Target, mode: str, targets: dict[str, _Target]) -> fm.Widen:
    channels = draw.choice([target.channels * n for n in (2, 2, 3)] + [target.channels + n for n in (1, target.groups, 4)])
    targets[target.name] = _replaced(target, channels=channels)
    return fm.Widen(target.name, channels, draw.choice(["pair", "zero", "duplicate"]))


def _deepen(draw: random.Random, target: _Target, mode: str, targets: dict[str, _Target]) -> fm.Deepen:
    hidden = draw.choice([None, None, target.channels, 2 * target.channels, target.channels + 4 * target.groups])
    sizes = draw.choice([None, None, (target.kernel, draw.choice([1, 2, 3])), (draw.choice([1, 3]), target.kernel)])
    operator = fm.Deepen(target.name, hidden, sizes if target.kernel else None, _activation(draw), _norm(draw, mode))
    del targets[target.name]
    if hidden is not None and sizes is None:
        second = tuple(3 if k > 1 else 1 for k in target.kernel)
        _put(targets, target, "first", channels=hidden)
        _put(targets, target, "second", inputs=hidden, kernel=second)
    return operator


def _grow(draw: random.Random, target: _Target, mode: str, targets: dict[str, _Target]) -> fm.GrowKernel:
    more = [draw.choice([0, 1, 2, 2]) for _ in target.kernel]
    size = tuple(k + n for k, n in zip(target.kernel, more, strict=True))
    if draw.random() < 0.1:
        del targets[target.name]  # most often its name goes on to be the convolution's
    else:
        targets[target.name] = _replaced(target, kernel=size)
    return fm.GrowKernel(target.name, size if draw.random() < 0.5 else max(size))


def _sequential(draw: random.Random, target: _Target, mode: str, targets: dict[str, _Target]) -> fm.InsertSubnet:
    del targets[target.name]
    return fm.InsertSubnet(target.name, _row(draw, target, mode, draw.randint(1, 3)))


def _row(draw: random.Random, target: _Target, mode: str, length: int) -> Any:
    size = target.kernel or 1
    layers: list[Any] = [
        (target.channels * draw.randint(1, 2), size, _activation(draw), _norm(draw, mode)) for _ in range(length - 1)
    ]
    return fm.Sequential([*layers, (None, size)])


def _stacked(draw: random.Random, target: _Target, mode: str, targets: dict[str, _Target]) -> fm.InsertSubnet:
    branches = [_row(draw, target, mode, draw.randint(1, 2)) for _ in range(draw.randint(1, 3))]
    skips = [fm.Skip()] if target.channels == target.inputs and draw.random() < 0.5 else []
    del targets[target.name]
    return fm.InsertSubnet(target.name, fm.Stacked([*branches, *skips]))


def _residual(draw: random.Random, target: _Target, mode: str, targets: dict[str, _Target]) -> fm.InsertSubnet:
    hidden, activation = 2 * draw.randint(1, 4), draw.choice(["relu", "gelu", "tanh", "sigmoid"])
    del targets[target.name]
    _put(targets, target, "layer")
    return fm.InsertSubnet(target.name, fm.Residual(hidden, draw.choice([1, 3]), activation, _norm(draw, mode)))


def _activation(draw: random.Random) -> str | None:
    return draw.choice([None, None, "relu", "gelu", "tanh", "sigmoid", "silu"])


def _norm(draw: random.Random, mode: str) -> str | None:
    """Only where the parent is in eval mode: elsewhere it is exact as far as a batch's statistics match, as documented."""
    return draw.choice([None, None, "batch"]) if mode == "eval" else None


def _put(targets: dict[str, _Target], target: _Target, part: str, **changes: Any) -> None:
    name = f"{target.name}.{part}"
    targets[name] = _replaced(target, name=name, **changes)


def _replaced(target: _Target, **changes: Any) -> _Target:
    return _Target(**{**vars(target), **changes})


_OPERATORS = {
    **{"widen": _widen, "deepen": _deepen, "grow": _grow},
    **{"sequential": _sequential, "stacked": _stacked, "residual": _residual},
}
