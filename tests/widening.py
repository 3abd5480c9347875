"""Networks to widen, with statistics that look trained, and the check that every widening must pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastmorph as fm

FILLS = ["pair", "zero", "duplicate"]


class Net(nn.Module):
    """Modules by name and a forward given as a function of the network and its input."""

    def __init__(self, forward: Any, **modules: Any) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """In eval mode; every parameter and statistic differs from channel to channel, and variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                positive = name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
                tensor.copy_(0.5 + noise.abs() if positive else noise / max(1, tensor[0].numel() if tensor.ndim else 1) ** 0.5)
    return model.to(dtype).eval()


def widened(model: nn.Module, sizes: dict[str, int], *x: Tensor, fill: str = "pair") -> nn.Module:
    """The child, which computes what its parent does; the parent is what it was."""
    before = copy.deepcopy(model.state_dict())
    child = fm.widen(model, sizes, example_inputs=x, fill=fill, generator=torch.Generator().manual_seed(0), verify=False)
    certificate = fm.verify(model, child, *x)
    assert certificate, f"{sizes}, {fill}:\n{certificate}"
    assert type(child) is type(model)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert sum(p.numel() for p in child.parameters()) > sum(p.numel() for p in model.parameters())
    return child
