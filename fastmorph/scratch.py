"""Tensors put away on disk."""

from __future__ import annotations

import weakref
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from fastmorph.elsewhere import Shelf


class DiskShelf(Shelf):
    """Every tensor that is put away is a file in a directory, until nobody can read it any more. Vectors stay in memory."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory, self._numbers = directory, count()

    def keep(self, value: Tensor) -> Tensor:
        """Write the values to a file of their own."""
        if value.ndim < 2:
            return value
        path, device = self._directory / f"{next(self._numbers)}.pt", value.device
        torch.save(value.detach().clone(memory_format=torch.contiguous_format).cpu(), path)

        def fetch() -> Tensor:
            found: Tensor = torch.load(path, weights_only=True)
            return found.to(device)

        weakref.finalize(fetch, path.unlink, missing_ok=True)
        return self.of(torch.empty(value.shape, dtype=value.dtype, device="meta"), device, fetch)
