"""What every test needs before it starts: Triton's interpreter, and memory that shows when it is read unwritten."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Triton reads this when a kernel is decorated, so it must stand before the first import of a kernel. With it kernels
# run on CPU tensors; TRITON_INTERPRET=0 runs the same tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# Tests run side by side, one process a core: threads of their own would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture
def kernel_device() -> torch.device:
    """The device on which kernels run here: the CPU where they are interpreted, else the GPU."""
    if os.environ["TRITON_INTERPRET"] == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("kernels are not interpreted (TRITON_INTERPRET=0), and there is no GPU")
    return torch.device("cuda")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Let PyTorch fill new memory with NaN, so that an operator that leaves part of its output unwritten is caught."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty((3,)).isnan().all(), "this PyTorch does not fill new memory"
    yield
    torch.use_deterministic_algorithms(False)
