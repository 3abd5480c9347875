"""Grown tensors written by the kernel have the bits that they have elsewhere, and one launch takes all of one dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention import grouped
from torch import nn
from widening import FILLS, Net, randn, trained

import fastmorph as fm
from fastmorph.morphs import widen_put
from fastmorph.morphs.widen_launch import is_launched

pytest.importorskip("triton")

from fastmorph_kernels.fill import kernel


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each launch has written."""
    seen: list[int] = []
    launch = kernel.launch_fill

    def counted(like: Any, table: Any, config: Any) -> None:
        seen.append(table.rows)
        launch(like, table, config)

    monkeypatch.setattr(kernel, "launch_fill", counted)
    return seen


def convolutions() -> nn.Module:
    """Layers with both sides grown, a depthwise one, a transposed one, a norm, and flattened channels."""
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 5, 1), nn.ReLU()]
    layers += [nn.ConvTranspose2d(5, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 5), nn.GELU(), nn.Linear(5, 2)]
    return nn.Sequential(*layers)


def residual() -> nn.Module:
    """A stream behind norms over channels, which grows by whole multiples, and an odd number inside."""
    parts = {"one": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}
    return Net(lambda m, x: m.last((h := m.one(x)) + m.down(torch.tanh(m.up(m.norm(h))))), **parts, last=nn.Linear(4, 2))


def weight_norm() -> nn.Module:
    inner = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), inner, nn.ReLU(), nn.Conv1d(6, 2, 1))


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = nn.functional.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


def widths(**channels: int) -> Callable[[str], list[Any]]:
    return lambda fill: [fm.Widen(layer.strip("_"), number, fill) for layer, number in channels.items()]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[str], list[Any]], tuple[int, ...]]] = {
    "convolutions": (convolutions, widths(_0=11, _4=8, _6=9, _9=10), (2, 3, 6, 6)),
    "residual": (residual, widths(one=12, up=9), (2, 5, 3)),
    "weight norm": (weight_norm, widths(_0=7, _2=9), (2, 3, 9)),
    "heads": (lambda: grouped(heads=4, groups=4), lambda fill: [fm.AddHeads("blocks.0", 5, None, fill)], (2, 7, 5)),
}


def same_bits(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
        assert not value.is_floating_point() or torch.equal(value.signbit(), theirs[name].signbit()), name


@pytest.mark.parametrize(
    ("fill", "dtype"), [*((fill, torch.float32) for fill in FILLS), ("pair", torch.float64), ("duplicate", torch.float16)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_child_is_the_same_to_the_bit(name, fill, dtype, launched):
    make, plan, shape = NETWORKS[name]
    parent = trained(make(), dtype)
    options = {"example_inputs": torch.randn(shape).to(dtype), "generator": 3, "verify": False}
    plain = fm.morph(parent, plan(fill), **options).model
    assert launched == []
    same_bits(fm.morph(parent, plan(fill), **options, backend="triton").model, plain)
    if name == "convolutions":
        before, after = parent.state_dict().values(), plain.state_dict().values()
        assert launched == [sum(p.shape != q.shape for p, q in zip(before, after, strict=True))]
    assert launched


def test_what_is_standardised_row_by_row_is_written_by_itself(launched):
    layers = [Standardised(3, 6, 3), nn.ReLU(), Standardised(6, 5, 2), nn.ReLU(), nn.Conv2d(5, 2, 1)]
    parent, x = trained(nn.Sequential(*layers)), randn(2, 3, 6, 6)
    children = [
        fm.widen(parent, {"0": 10}, example_inputs=x, generator=3, verify=False, backend=backend)
        for backend in (None, "triton")
    ]
    same_bits(*children)
    assert launched == [2]  # the rows that make the channels, and their bias; not what reads them


def test_a_parent_that_is_consumed_is_written_tensor_by_tensor(launched):
    parent = trained(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    fm.morph(parent, [fm.Widen("0", 6)], backend="triton", consume=True, verify=False)
    assert launched == [1, 1, 1]


def test_tensors_wait_for_each_other_up_to_a_bound(launched, monkeypatch):
    monkeypatch.setattr(widen_put, "_TOGETHER", 2 * 12 * 8)  # two weights of 12 numbers
    layers = [part for _ in range(4) for part in (nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))]
    fm.widen(trained(nn.Sequential(*layers)), {"0": 6, "3": 6, "6": 6}, backend="triton", verify=False)
    assert launched == [2, 2, 2]


@pytest.mark.parametrize("fill", FILLS)
def test_moments_have_the_same_bits_too(fill, launched):
    parent, x = trained(convolutions(), torch.float32), torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.Adam(parent.parameters())
    parent(x).square().sum().backward()
    optimizer.step()
    plan = NETWORKS["convolutions"][1](fill)
    options = {"example_inputs": x, "generator": 3, "verify": False, "optimizer": optimizer}
    plain, found = (fm.morph(parent, plan, **options, backend=backend).optimizer for backend in (None, "triton"))
    for one, other in zip(plain.state.values(), found.state.values(), strict=True):
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
    assert len(launched) > 1


class Wrapped(torch.Tensor):
    """One of those tensors whose memory may be anywhere."""


def test_a_kernel_takes_plain_floats_where_it_is_wanted():
    plain = torch.ones(2)
    assert is_launched(plain, "triton")
    assert is_launched(nn.Parameter(plain), "triton")
    assert not any(is_launched(plain, backend) for backend in (None, "torch", "numpy"))
    assert not any(is_launched(other, "triton") for other in (plain.as_subclass(Wrapped), plain.long()))
