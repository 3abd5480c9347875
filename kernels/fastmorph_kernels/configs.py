"""Tile sizes and launch settings of the kernels, from one table a kernel: `configs/<kernel>.json`.

A table maps a device's name, as `torch.cuda.get_device_name` gives it, to a dtype, to a variant (a kernel's own names for
its cases, such as "small" and "large"), to the settings. "default" stands for every device that has no entry of its own.
Nothing is timed at run time: a tuner writes the tables.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

Config = dict[str, int]
Table = dict[str, dict[str, dict[str, Config]]]

FOLDER = Path(__file__).with_suffix("")
DEFAULT = "default"


class Shipped(NamedTuple):
    """One entry of a kernel's table."""

    device: str
    dtype: torch.dtype
    variant: str
    config: Config


def lookup(kernel: str, dtype: torch.dtype, variant: str, device: torch.device) -> Config:
    """The settings of `kernel` at `dtype` in one of its variants, for `device`. Raises KeyError where there are none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT
    return dict(_entry(kernel, name, str(dtype).removeprefix("torch."), variant))


def shipped(kernel: str) -> Iterator[Shipped]:
    """Every entry of a kernel's table, those for single devices too."""
    for device, dtypes in _table(kernel).items():
        for dtype, variants in dtypes.items():
            for variant, config in variants.items():
                yield Shipped(device, getattr(torch, dtype), variant, dict(config))


@functools.cache
def _entry(kernel: str, device: str, dtype: str, variant: str) -> Config:
    table = _table(kernel)
    own = table.get(device, {}).get(dtype, {}).get(variant)
    return table[DEFAULT][dtype][variant] if own is None else own


@functools.cache
def _table(kernel: str) -> Table:
    table: Table = json.loads((FOLDER / f"{kernel}.json").read_text())
    return table
