"""Tile sizes and launch settings of the kernels, from one table an operator: `<operator>/configs.json`.

A table maps a device's name, as `torch.cuda.get_device_name` gives it, to a dtype, to a variant (an operator's own names for
its cases, such as "small" and "large"), to the settings. "default" stands for every device that has no entry of its own.
Nothing is timed at run time: a tuner writes the tables.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

Config = dict[str, int]
Table = dict[str, dict[str, dict[str, Config]]]

DEFAULT = "default"


class Shipped(NamedTuple):
    """One entry of an operator's table."""

    device: str
    dtype: torch.dtype
    variant: str
    config: Config


def lookup(operator: str, dtype: torch.dtype, variant: str, device: torch.device) -> Config:
    """The settings of `operator` at `dtype` in one of its variants, for `device`. Raises KeyError where there are none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT
    return dict(_entry(operator, name, str(dtype).removeprefix("torch."), variant))


def launch_options(config: Any, *, fused: bool = True) -> dict[str, Any]:
    """What Triton takes beside a kernel's arguments, for a configuration with `num_warps` and `num_stages`.

    If `fused`, a product and its sum are rounded once: the more accurate choice, and what `ieee` compiles to anyway.
    """
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": fused}


def shipped(operator: str) -> Iterator[Shipped]:
    """Every entry of an operator's table, those for single devices too."""
    for device, dtypes in _table(operator).items():
        for dtype, variants in dtypes.items():
            for variant, config in variants.items():
                yield Shipped(device, getattr(torch, dtype), variant, dict(config))


def table_paths() -> dict[str, Path]:
    """Where the table of each operator is."""
    return {path.parent.name: path for path in sorted(Path(__file__).parent.glob("*/configs.json"))}


@functools.cache
def _entry(operator: str, device: str, dtype: str, variant: str) -> Config:
    table = _table(operator)
    own = table.get(device, {}).get(dtype, {}).get(variant)
    return table[DEFAULT][dtype][variant] if own is None else own


@functools.cache
def _table(operator: str) -> Table:
    table: Table = json.loads(table_paths()[operator].read_text())
    return table
