"""A grown network in one safetensors file, or several: its weights, its history, its certificate, its optimizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastmorph.certify.certificate import Certificate
from fastmorph.checkpoint.training import describe_optimizer, describe_scheduler
from fastmorph.checkpoint.values import encode
from fastmorph.errors import MorphError
from fastmorph.plan.history import history
from fastmorph.plan.plan import Plan

INDEX = "model.safetensors.index.json"
VERSION = 1


def save(
    path: str | Path,
    child: nn.Module,
    *,
    plan: Plan | Iterable[Plan] | None = None,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    certificate: Certificate | None = None,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a grown network, so that `load` gives it back with its optimizer and scheduler as they stand.

    Weights and buffers keep their names and dtypes, tied ones are stored once: other programs read them as any safetensors
    file. The optimizer's tensors stand beside them under names that begin with ".optimizer", which no weight's can. The rest
    is JSON in the file's metadata; nothing is pickled. A file is replaced only once the new one is whole.

    Args:
        path: a file *.safetensors; or a directory, for files of at most `shard_bytes` and their index.
        child: the network; it is not touched.
        plan: the growths that made it out of what the model's factory builds, in order (each a `Morphed.history`). None: those
            that the child knows, by `history`.
        optimizer: the child's.
        scheduler: of that optimizer.
        certificate: of the child's birth, kept for whoever asks.
        shard_bytes: the largest file in a directory, in bytes; a larger tensor has a file of its own.

    Raises:
        MorphError: state that no file without pickles can hold, an optimizer of other parameters, a scheduler without its
            optimizer.
        ModuleNotFoundError: safetensors is not installed.
    """
    if scheduler is not None and optimizer is None:
        raise MorphError("a scheduler is saved with the optimizer that it drives; give optimizer= too.")
    plans = history(child) if plan is None else (plan,) if isinstance(plan, Plan) else tuple(plan)
    tensors: dict[str, Tensor] = {}
    state = child.state_dict()
    extra = encode({name: value for name, value in state.items() if not isinstance(value, Tensor)}, ".extra", tensors)
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.is_meta:
                raise MorphError(f"{name!r} stands on the meta device and has no values to save.")
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
            kept = first.setdefault(place, name) if value.numel() else name
            if kept != name:
                aliases[name] = kept
            else:
                tensors[name] = value
    about = {
        "version": VERSION,
        "plans": [each.to_toml() for each in plans],
        "certificate": None if certificate is None else certificate.to_dict(),
        "aliases": aliases,
        "frozen": [name for name, parameter in child.named_parameters() if not parameter.requires_grad],
        "extra": extra,
        "optimizer": None if optimizer is None else describe_optimizer(optimizer, child, tensors),
        "scheduler": None if scheduler is None else describe_scheduler(scheduler, tensors),
    }
    _write(Path(path), tensors, json.dumps(about, allow_nan=False), shard_bytes)


def _write(path: Path, tensors: Mapping[str, Tensor], about: str, shard_bytes: int) -> None:
    if path.suffix == ".safetensors":
        _write_file(path, tensors, {"format": "pt", "fastmorph": about})
        return
    path.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(path / file, shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values()), "fastmorph": about},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    new = path / f"{INDEX}.new"
    new.write_text(json.dumps(index, indent=2, allow_nan=False), encoding="utf-8")
    os.replace(new, path / INDEX)


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    new = path.with_name(f"{path.name}.new")
    # Files hold whole, contiguous tensors, and no two of one storage.
    save_file({name: _whole(tensor) for name, tensor in tensors.items()}, new, metadata)
    os.replace(new, path)


def _whole(tensor: Tensor) -> Tensor:
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
