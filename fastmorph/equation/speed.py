"""What a device multiplies quickly in: a table, by compute capability."""

from __future__ import annotations

import torch

# No matrix unit for float64, and 1/64 of float32's rate or a little more without one (CUDA C++ programming guide, throughput of
# native arithmetic instructions).
_SLOW_FLOAT64 = frozenset({(8, 6), (8, 9), (10, 0), (12, 0)})


def factors_in(device: torch.device) -> torch.dtype:
    """The dtype for Gram matrices and factors of weights of 32 bits or fewer; their residuals are taken in float64 anyway."""
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) in _SLOW_FLOAT64
    return torch.float32 if slow else torch.float64
