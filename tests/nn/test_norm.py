"""Batch norms that are the identity at birth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from modules import randn
from torch import nn

from fastmorph.errors import MorphError
from fastmorph.nn import (
    BatchNormLast,
    BatchNormMap1d,
    BatchNormMap2d,
    BatchNormMap3d,
    identity_batch_norm,
)


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 3), (2, 3, 3, 3)])
def test_batch_norm_last_is_batch_norm_with_the_channels_moved(shape):
    last, plain = BatchNormLast(3).double(), nn.BatchNorm1d(3).double()
    x = randn(*shape, dtype=torch.float64) * 2 + 1
    for mode in (True, False):
        y = last.train(mode)(x)
        expected = plain.train(mode)(x.flatten(0, -2).T[None].contiguous())[0].T.reshape(shape)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[key], value)
    assert torch.equal(last(x[(0,) * (x.ndim - 1)]), last(x)[(0,) * (x.ndim - 1)])  # no leading dimension at all


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_batch_norm_is_the_identity_in_eval(dtype, eps):
    channels = 4096
    mean, var = randn(channels, dtype=torch.float64) * 5, randn(channels, seed=1, dtype=torch.float64).square() * 10
    norm = nn.BatchNorm1d(channels, eps=eps, dtype=dtype).eval()
    assert identity_batch_norm(norm, mean, var) is norm
    # The variance as the norm holds it, its root in float64, one rounding; PyTorch's float64 root is good to 1 ulp.
    root = torch.from_numpy(np.sqrt(var.to(dtype).numpy().astype(np.float64) + eps)).to(dtype)
    torch.testing.assert_close(norm.weight.detach(), root, rtol=2.3e-16 if dtype == torch.float64 else 0, atol=0)
    assert torch.equal(norm.running_mean, mean.to(dtype))
    x = (randn(8, channels, seed=2, dtype=torch.float64) * var.sqrt() + mean).to(dtype)
    # Roundings of the scale, the shift and their sum: measured 2.3 eps, at the scale of the larger of x and mean.
    size = torch.maximum(x.abs(), mean.to(dtype).abs())
    assert ((norm(x) - x).abs() / size).max() < 4 * torch.finfo(dtype).eps
    assert norm.weight.requires_grad
    assert norm.weight.is_leaf
    assert norm.weight.grad_fn is None


@pytest.mark.parametrize("norm", [BatchNormLast(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)])
def test_identity_batch_norm_at_birth(norm):
    nn.init.normal_(norm.weight)
    identity_batch_norm(norm)
    shape = (2, 3, 3, 3, 3)[: {BatchNormLast: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}[type(norm)]]
    x = randn(*shape)
    torch.testing.assert_close(norm.eval()(x), x, rtol=3e-7, atol=0)
    assert norm.weight[0].item() == np.float32(np.sqrt(1 + norm.eps))
    with torch.device("meta"):  # as for the architecture alone, without weights
        assert identity_batch_norm(nn.BatchNorm2d(3)).weight.is_meta


@pytest.mark.parametrize(
    ("norm", "statistics", "cause"),
    [
        (nn.BatchNorm1d(3, affine=False), {}, "affine=True"),
        (nn.BatchNorm1d(3, track_running_stats=False), {}, "track_running_stats=True"),
        (nn.BatchNorm1d(3), {"mean": torch.zeros(2)}, r"shape \(3,\)"),
        (nn.BatchNorm1d(3), {"var": torch.ones(1, 3)}, r"shape \(3,\)"),
        (nn.BatchNorm1d(3), {"var": -1.0}, "not negative"),
        (nn.BatchNorm1d(3), {"mean": float("nan")}, "finite"),
        (nn.BatchNorm1d(3).half(), {"var": 1e6}, "finite in torch.float16"),
    ],
)
def test_identity_batch_norm_refuses(norm, statistics, cause):
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(MorphError, match=cause):
        identity_batch_norm(norm, **statistics)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize(("norm", "dims"), [(BatchNormMap1d(3), 1), (BatchNormMap2d(3), 2), (BatchNormMap3d(3), 3)])
def test_a_map_without_a_batch_is_a_batch_of_one(norm, dims):
    plain = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](3).double()
    norm = norm.double()
    x = torch.randn(2, 3, *[4] * dims, dtype=torch.float64)
    for mode in (True, False):
        norm.train(mode), plain.train(mode)
        assert torch.equal(norm(x), plain(x))
        assert torch.equal(norm(x[0]), plain(x[:1])[0])
        assert torch.equal(norm.running_var, plain.running_var)
