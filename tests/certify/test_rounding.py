"""A parent that rounds by itself is judged by its own rounding; an error of algebra is not, and its layer is named."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from pairs import Apply, family
from torch import Tensor, nn

from fastmorph.certify.compare import TOLERANCES
from fastmorph.certify.recorded import certify, record
from fastmorph.certify.verify import verify


class Island(nn.Module):
    """A network that computes its softmax and its norm in float32 whatever its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(24, 40), nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        y = y + torch.softmax(y, -1, dtype=torch.float32).to(y.dtype)
        narrow = y.float()
        return self.out((narrow * torch.rsqrt(narrow.square().mean(-1, keepdim=True) + 1e-6)).to(y.dtype))


def permuted(model: nn.Module) -> nn.Module:
    """The same function with its hidden channels in another order, so that sums over them round otherwise."""
    child = deepcopy(model)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        child.into.weight.copy_(model.into.weight[order])
        child.into.bias.copy_(model.into.bias[order])
        child.out.weight.copy_(model.out.weight[:, order])
    return child


def deepened(model: nn.Module, name: str, error: float = 0.0) -> nn.Module:
    """A child whose layer is two: the second invertible, so that only rounding, and `error` at one weight, differ."""
    child = deepcopy(model)
    layer = child.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(layer.out_features, layer.out_features, dtype=torch.float64, generator=generator)
    first, second = deepcopy(layer), nn.Linear(layer.out_features, layer.out_features).to(layer.weight)
    with torch.no_grad():
        first.weight.copy_(torch.linalg.solve(square, layer.weight.double()))
        first.bias.zero_()
        second.weight.copy_(square)
        second.bias.copy_(layer.bias)
        first.weight[0, 0] += error
    parent_of, _, leaf = name.rpartition(".")
    setattr(child.get_submodule(parent_of), leaf, nn.Sequential(first, second))
    return child


@pytest.fixture
def island() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Island().double(), torch.randn(64, 24, dtype=torch.float64)


def test_a_float32_island_in_float64_is_judged_by_the_parents_own_rounding(island: tuple[nn.Module, Tensor]) -> None:
    parent, x = island
    child = permuted(parent)
    certificate = verify(parent, child, x)
    (row,) = certificate.rows
    assert certificate, certificate
    assert row.max_rel > TOLERANCES[torch.float64][0]  # it would be refused by float64's own tolerance
    assert row.raised
    assert row.noise is not None
    assert 2**-27 < row.noise < 2**-20  # rounding of float32: an eps is 2**-23
    assert row.tolerance == pytest.approx(8 * row.noise)
    assert row.tolerance < TOLERANCES[torch.float32][0]
    assert "raises the tolerance" in certificate.verdict
    assert certify(record(parent, x), child, x).rows == certificate.rows


def test_an_error_above_the_islands_rounding_fails_and_its_layer_is_named(island: tuple[nn.Module, Tensor]) -> None:
    parent, x = island
    for layer in ("into", "out"):
        certificate = verify(parent, deepened(parent, layer, error=1e-3), x)
        assert not certificate
        assert certificate.verdict.startswith("FAILS in algebra")
        assert f"The first layer whose output differs is {layer!r} (Linear in the parent, Sequential in the child)" in str(
            certificate
        )
    assert "after 1 layers that agree" in certificate.where


def test_a_given_tolerance_is_not_raised(island: tuple[nn.Module, Tensor]) -> None:
    parent, x = island
    certificate = verify(parent, permuted(parent), x, tolerance=1e-9)
    assert not certificate
    assert not any(row.raised for row in certificate.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_error_of_algebra_in_a_plain_network_fails_and_its_layer_is_named(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Sequential(nn.Linear(40, 30), nn.ReLU()), nn.Linear(30, 7)).to(
        dtype
    )
    x = torch.randn(16, 24, dtype=torch.float64).to(dtype)
    error = 1e-6 if dtype == torch.float64 else 1e-2
    assert verify(parent, deepened(parent, "2.0"), x)
    certificate = verify(parent, deepened(parent, "2.0", error), x)
    assert not certificate
    assert not any(row.raised for row in certificate.rows)
    assert certificate.verdict.startswith("FAILS in algebra")
    assert "The first layer whose output differs is '2.0' (Linear in the parent, Sequential in the child)" in certificate.where
    assert "after 2 layers that agree" in certificate.where
    assert "Remedy: " in certificate.where


def test_an_error_of_1e_6_in_float32_weights_is_below_their_own_rounding_and_one_of_1e_4_of_the_output_is_not() -> None:
    """What float32 weights leave to see: their own rounding is 1e-7, and the tolerance 2e-5 of the float64 run."""
    parent, child, x = family(error=1e-3, dtype=torch.float32)
    certificate = verify(parent, child, x)
    assert not certificate
    assert 2e-5 < certificate.rows[1].max_rel < 1e-3
    assert certificate.where.startswith("The first layer whose output differs is '0'")


def test_a_layer_called_again_is_named_by_the_call_that_differs_first() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Linear(5, 5), nn.Linear(5, 5), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.two(self.act(self.one(x))))

    parent = Shared().double()
    certificate = verify(parent, deepened(parent, "two", 1e-3), torch.randn(3, 5, dtype=torch.float64))
    assert "is 'two' (" in certificate.where  # 'act' is called before it, and differs after it


def test_grown_channels_are_compared_on_the_old_ones() -> None:
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    child = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        child[0].weight[:6], child[0].bias[:6] = parent[0].weight, parent[0].bias
        child[2].weight[:, :6], child[2].weight[:, 6:], child[2].bias[:] = parent[2].weight, 0, parent[2].bias
    x = torch.randn(5, 4).double()
    assert verify(parent, child, x)
    with torch.no_grad():
        child[2].weight[0, 0] += 1e-3
    assert "is '2' (Linear)" in verify(parent, child, x).where
    with torch.no_grad():
        child[2].weight[0, 0] -= 1e-3
        child[0].bias[0] += 1e-3
    assert "is '0' (Linear)" in verify(parent, child, x).where


def test_a_layer_inside_of_one_that_agrees_is_not_named() -> None:
    """Hidden channels in another order are read in that order; what differs after that is what is wrong."""
    torch.manual_seed(0)
    inner = Island()
    parent = nn.Sequential(inner, nn.Linear(7, 3)).double()
    child = nn.Sequential(permuted(inner), deepened(nn.Sequential(parent[1]), "0", 1e-1)[0]).double()
    certificate = verify(parent, child, torch.randn(8, 24).double())
    assert not certificate
    assert "is '1' (Linear in the parent, Sequential in the child)" in certificate.where


def test_what_differs_outside_of_layers_is_said_to() -> None:
    certificate = verify(Apply(lambda y: y * 2, nn.Tanh()), Apply(lambda y: y * 3, nn.Tanh()), torch.randn(4))
    assert not certificate
    assert "look at what runs outside of layers" in certificate.verdict


def test_rounding_is_named_as_such_with_its_layer() -> None:
    parent, _, x = family(dtype=torch.float32)
    child = deepcopy(parent)
    child[1] = nn.Sequential(nn.Tanh(), Apply(lambda y: (y + 1e4) - 1e4))
    certificate = verify(parent, child, x)
    assert certificate.verdict.startswith("FAILS in rounding, not in algebra")
    assert "is '1' (Tanh in the parent, Sequential in the child)" in certificate.where
    assert "finer dtype" in certificate.where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_rounding_raises_a_tolerance_no_further_than_the_next_coarser_dtype(dtype: torch.dtype) -> None:
    """A float32 network with a bfloat16 inside rounds at 2**-9; 8 times that is more than float16's tolerance."""
    torch.manual_seed(0)
    parent = Apply(lambda y: y.bfloat16().to(y.dtype), nn.Linear(24, 40)).to(dtype)
    x = torch.randn(4096, 24).to(dtype)  # so many that some numbers round the other way
    child = deepened(parent, "inner.0")
    certificate = verify(parent, child, x)
    own = certificate.rows[0]
    assert own.noise is not None
    if dtype == torch.float32:
        assert own.noise > 1e-3
        assert own.raised
        assert own.tolerance == TOLERANCES[torch.float16][0]
    else:
        assert not own.raised
        assert own.tolerance == TOLERANCES[dtype][0]


def test_attention_runs_by_its_definition_in_float64() -> None:
    """nn.MultiheadAttention, a transformer and masks: the fused paths are set aside, and nothing else changes."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double()
    x, dropped = torch.randn(3, 5, 16).double(), torch.zeros(3, 5, dtype=torch.bool)
    dropped[0, 3:] = True
    assert verify(model, deepcopy(model), x, kwargs={"src_key_padding_mask": dropped}, tolerance=0)

    class Attention(nn.Module):
        def __init__(self, by_hand: bool) -> None:
            super().__init__()
            self.by_hand = by_hand

        def forward(self, q: Tensor, kept: Tensor) -> Tensor:
            if not self.by_hand:
                return F.scaled_dot_product_attention(q, q, q, kept, scale=0.3)
            return ((q @ q.mT) * 0.3).masked_fill(~kept, -torch.inf).softmax(-1) @ q

    q, kept = torch.randn(2, 4, 6, 8).double(), torch.rand(2, 1, 6, 6) > 0.3
    kept |= torch.eye(6, dtype=torch.bool)
    assert verify(Attention(True), Attention(False), q, kept).max_rel < 1e-14
