"""The files of a checkpoint: tensors read from safetensors by their names, and written from the header on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmorph.elsewhere import Elsewhere, Shelf, values_of
from fastmorph.errors import MorphError

INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"
SCRATCH = ".growing"  # a directory for what is not yet whole
_SMALL = 2**16  # bytes up to which a tensor that is made stays in memory


class DiskShelf(Shelf):
    """Tensors in the files of a checkpoint; what is made of them is made when it is read, or put into scratch files."""

    late = True

    def __init__(self, source: Path, scratch: Path) -> None:
        super().__init__()
        self._scratch, self._made = scratch, 0
        index = source / INDEX
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [_ONE]
        self.names: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        for file in files:
            if not (source / file).exists():
                raise MorphError(f"{source} holds no {file}: a checkpoint in safetensors is needed.")
            for name, entry in header_of(source / file).items():
                if name != "__metadata__":
                    self.names[name] = (source / file, _dtype(entry["dtype"], name), tuple(entry["shape"]))

    def stored(self, name: str) -> Elsewhere:
        """A tensor of the checkpoint."""
        from safetensors import safe_open

        file, dtype, shape = self.names[name]

        def fetch() -> Tensor:
            with safe_open(file, "pt") as opened:
                found: Tensor = opened.get_tensor(name)
            return found

        return self.of(torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"), fetch)

    def keep(self, value: Tensor) -> Tensor:
        """Put a tensor into a scratch file."""
        if isinstance(value, Elsewhere) or value.nbytes <= _SMALL:
            return value
        self._made += 1
        path = self._scratch / f"{self._made}.bin"
        _bytes(value).tofile(path)
        shape, dtype, count = value.shape, value.dtype, value.numel()

        def fetch() -> Tensor:
            return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)

        return self.of(torch.empty(shape, dtype=dtype, device="meta"), value.device, fetch)


def write_files(tensors: Sequence[tuple[str, Tensor]], target: Path, shelf: Shelf, shard_size: int, growth: str) -> None:
    """Shards and their index, each with its header first; a shard that the same growth left whole is kept.

    Args:
        tensors: with the names that they are to have.
        target: a directory.
        shelf: of those whose values are elsewhere; each is read once, and written.
        shard_size: most bytes of a file, unless one tensor has more.
        growth: what tells this growth from others.
    """
    shards = list(_shards(tensors, shard_size))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [_ONE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        part = target / SCRATCH / name
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "growth": growth}}
        at = 0
        for key, tensor in shard:
            header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        there = target / name
        if there.exists() and there.stat().st_size == 8 + len(text) + at and header_of(there) == header:
            continue
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in shard:
                file.write(_bytes(values_of(tensor)))
                shelf.let_go()
        part.replace(there)
    if len(shards) > 1:
        weights = {key: name for name, shard in zip(names, shards, strict=True) for key, _ in shard}
        total = sum(tensor.nbytes for _, tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _shards(tensors: Sequence[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    shard: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        if shard and sum(held.nbytes for _, held in shard) + tensor.nbytes > size:
            yield shard
            shard = []
        shard.append((name, tensor))
    yield shard


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _dtype(text: str, name: str) -> torch.dtype:
    if text not in _DTYPES:
        raise MorphError(
            f"{name!r} is stored as {text}, in which nothing is grown; convert the checkpoint to a floating dtype."
        )
    return _DTYPES[text]


def header_of(file: Path) -> dict[str, Any]:
    """What a file of safetensors says of its tensors, by name."""
    with file.open("rb") as opened:
        found: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return found


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
