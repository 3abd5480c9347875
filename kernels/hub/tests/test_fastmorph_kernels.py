"""The package as it is loaded from the Hub, on the device that PyTorch is built for."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels

package = kernels.get_local_kernel(Path(__file__).resolve().parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compose_is_the_full_convolution(dtype):
    first, second = torch.randn(2, 5, 3, 3, 2, dtype=dtype), torch.randn(2, 4, 5, 2, 3, dtype=dtype)
    expected = np.zeros((2, 4, 3, 4, 4))
    for u, v in itertools.product(np.ndindex(3, 2), np.ndindex(2, 3)):
        expected[..., u[0] + v[0], u[1] + v[1]] += second[..., *v].double().numpy() @ first[..., *u].double().numpy()
    found = package.compose(first.to(DEVICE), second.to(DEVICE)).cpu().double().numpy()
    terms = 5 * 6  # each entry is a sum of at most so many products
    assert np.abs(found - expected).max() <= terms * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.kernels_ci
def test_the_operators_are_in_the_package_s_own_namespace():
    names = {str(torch.ops.__dict__[name]) for name in torch.ops.__dict__ if "fastmorph_kernels_" in name}
    assert len(names) == 1
    assert not hasattr(torch.ops.fastmorph_kernels, "compose")
