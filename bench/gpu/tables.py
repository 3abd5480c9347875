"""The kernels' tables of settings: a candidate in one of them for a while, or a winner in its file for good."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastmorph_kernels import configs

Config = dict[str, int]


@contextmanager
def holding(kernel: str, dtype: torch.dtype, variants: Sequence[str], config: Config, device: torch.device) -> Iterator[None]:
    """Let entries of a table be `config` in this process meanwhile."""
    entries = configs._table(kernel).setdefault(device_name(device), {}).setdefault(str(dtype).removeprefix("torch."), {})
    before = dict(entries)
    entries.update(dict.fromkeys(variants, config))
    configs._entry.cache_clear()
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)
        configs._entry.cache_clear()


def write(kernel: str, dtype: torch.dtype, variant: str, config: Config, device: torch.device) -> None:
    """Put an entry into the kernel's file, under the device's name, and let this process take it up."""
    path = configs.table_paths()[kernel]
    table = json.loads(path.read_text())
    table.setdefault(device_name(device), {}).setdefault(str(dtype).removeprefix("torch."), {})[variant] = config
    path.write_text(render(table))
    configs._table.cache_clear()
    configs._entry.cache_clear()


def device_name(device: torch.device) -> str:
    """What a table calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else configs.DEFAULT


def render(table: dict[str, Any]) -> str:
    """A table as its file has it: a line for each entry, and one for a dtype that has but one."""
    devices = []
    for device, dtypes in table.items():
        rows = []
        for dtype, variants in dtypes.items():
            cells = [f"{json.dumps(variant)}: {json.dumps(config)}" for variant, config in variants.items()]
            inner = f"{{{cells[0]}}}" if len(cells) == 1 else "{\n      " + ",\n      ".join(cells) + "\n    }"
            rows.append(f"    {json.dumps(dtype)}: {inner}")
        devices.append(f"  {json.dumps(device)}: {{\n" + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(devices) + "\n}\n"
