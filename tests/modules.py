"""Tensors and networks of a fixed seed, for the tests of `fastmorph.nn`."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def set_a(module, *values):
    with torch.no_grad():
        module.a.copy_(torch.tensor(values))
    return module


def layers(*activations):
    """A Linear, then each activation and a Linear after it, on 4 features, with weights of a fixed seed."""
    modules = [nn.Linear(4, 4)]
    for activation in activations:
        modules += [activation, nn.Linear(4, 4)]
    model = nn.Sequential(*modules)
    with torch.no_grad():
        for seed, parameter in enumerate(p for m in model if isinstance(m, nn.Linear) for p in m.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return model
