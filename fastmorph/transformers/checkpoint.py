"""A checkpoint grown into a checkpoint: tensors come from the files one at a time, and what is made of them goes to files.

The plan is carried out on the architecture alone, whose weights are elsewhere (`fastmorph.elsewhere`): on disk. A tensor that
is made is put into a scratch file; in the end each output file is written from its header on, tensor by tensor. The bits are
those that `fastmorph.transformers.grow` makes in memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.recorded import certify, record
from fastmorph.elsewhere import Elsewhere, Shelf, values_of
from fastmorph.equation.randomness import draw_seed
from fastmorph.equation.solvers import Auto
from fastmorph.errors import MorphError
from fastmorph.inputs import as_call
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.parents import check_parent
from fastmorph.plan.plan import Plan
from fastmorph.plan.streamed import Streamed
from fastmorph.transformers.example import example_call
from fastmorph.transformers.grow import check_stock, say_sizes
from fastmorph.transformers.recipe import recipe
from fastmorph.transformers.sizes import implied, shapes_of, size_of

_INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"
_SMALL = 2**16  # bytes up to which a tensor that is made stays in memory
_SCRATCH = ".growing"
_SOLVING = {"solver": Auto(), "backend": None, "precision": None, "allow_inexact": False, "memory_budget": 2**31}


class DiskShelf(Shelf):
    """Tensors in the files of a checkpoint, and in scratch files."""

    def __init__(self, source: Path, scratch: Path) -> None:
        super().__init__()
        self._scratch, self._made = scratch, 0
        index = source / _INDEX
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [_ONE]
        self.names: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        for file in files:
            if not (source / file).exists():
                raise MorphError(f"{source} holds no {file}: a checkpoint in safetensors is needed.")
            for name, entry in _header(source / file).items():
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
        if value.nbytes <= _SMALL:
            return value
        self._made += 1
        path = self._scratch / f"{self._made}.bin"
        _bytes(value).tofile(path)
        shape, dtype, count = value.shape, value.dtype, value.numel()

        def fetch() -> Tensor:
            return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)

        return self.of(torch.empty(shape, dtype=dtype, device="meta"), value.device, fetch)


def grow_checkpoint(
    source: str | Path,
    target: str | Path,
    sizes: Mapping[str, int | None],
    *,
    fill: str | None = None,
    untie: bool = False,
    seed: int | None = None,
    verify: bool = True,
    shard_size: int = 5 * 10**9,
) -> tuple[Plan, Certificate | None]:
    """Grow a checkpoint directory of transformers into another one, which its stock class loads.

    Args:
        source: config.json and safetensors, in one file or several with their index.
        target: a directory to make; files of an interrupted growth with the same arguments that are whole are kept.
        sizes: as the keywords of `fastmorph.transformers.grow`.
        fill: as there.
        untie: as there.
        seed: of all noise; None: a random one.
        verify: whether to load both models, one after the other, and compare them on ids.
        shard_size: most bytes of an output file, unless one tensor has more.

    Returns:
        The plan as it was run, and the certificate; None without `verify`.

    Raises:
        MorphError: as `fastmorph.transformers.grow` does; the checkpoint is no safetensors, or its tensors stand under other
            names than those of its class.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise MorphError("the grown checkpoint needs a directory of its own.")
    scratch = target / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shelf = DiskShelf(source, scratch)
    model = _architecture(source, shelf)
    check_parent(model)
    plan = recipe(model, sizes, fill, untie=untie)
    seed = draw_seed(seed)
    sizes = implied(model, sizes)
    olds, shapes = {name: size_of(model, name) for name in sizes}, shapes_of(model)
    heads = any(sizes.get(name) is not None for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    call = example_call(model, cached=not heads)
    lineage = Lineage((parameter, parameter) for parameter in model.parameters())
    transaction = Streamed(model, lineage, shelf=shelf, seed=seed, example_inputs=as_call(call, model), solving=dict(_SOLVING))
    transaction.run(plan)
    transaction.settle()
    shelf.let_go()
    child: Any = transaction.model
    say_sizes(child, sizes, olds, shapes)
    check_stock(child, None, {(olds[name], new) for name, new in sizes.items()})
    history = plan.recorded(transaction.resolved(), seed, as_call(call, model))
    told = json.dumps([history.to_toml(), sorted(map(str, shelf.names.items())), _stamp(source)])
    _write(child, target, shelf, shard_size, hashlib.sha256(told.encode()).hexdigest())
    shutil.rmtree(scratch)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin") and file.name not in (_INDEX, "config.json"):
            shutil.copyfile(file, target / file.name)
    child.config.save_pretrained(target)
    history.save(target / "growth.toml")
    if not verify:
        return history, None
    kind = type(child)
    before = record(kind.from_pretrained(source).eval(), call)
    certificate = certify(before, kind.from_pretrained(target).eval(), call, transaction.readings)
    certificate = replace(certificate, on=", ".join(filter(None, ("random ids", certificate.on))), where="")
    if not certificate:
        raise MorphError(f"the grown checkpoint does not compute what the other computes:\n{certificate}")
    return history, certificate


def _architecture(source: Path, shelf: DiskShelf) -> Any:
    """The model of a checkpoint, its weights elsewhere. Raises MorphError where names or shapes are not its class's."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    kind = getattr(transformers, (getattr(config, "architectures", None) or ["?"])[0], None)
    if kind is None:
        raise MorphError(f"{source}/config.json names no class of transformers under architectures.")
    with torch.device("meta"):
        model = kind(config)
    model.eval()
    places: dict[int, list[tuple[dict[str, Any], str, str]]] = {}
    persistent = set(model.state_dict())
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                name = f"{path}.{key}" if path else key
                if tensor is not None and name in persistent:
                    places.setdefault(id(tensor), []).append((held, key, name))
    used = set()
    for where in places.values():
        held, key, _ = where[0]
        old = held[key]
        name = next((name for *_, name in where if name in shelf.names), None)
        if name is None or shelf.names[name][2] != tuple(old.shape):
            found = "is not there" if name is None else f"has the shape {shelf.names[name][2]}"
            raise MorphError(
                f"{where[0][2]!r} of a {kind.__name__}, of shape {tuple(old.shape)}, {found} in {source}: the class renames or "
                "joins tensors as it loads them; load the model, and use fastmorph.transformers.grow."
            )
        used |= {name for *_, name in where}
        new: Any = shelf.stored(name)
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else values_of(new)
        for held, key, _ in where:
            held[key] = new
    spare = sorted(shelf.names.keys() - used)
    if spare:
        raise MorphError(f"{source} holds {spare[0]!r}, which a {kind.__name__} does not have; save it by save_pretrained.")
    return model


# --- files --------------------------------------------------------------------------------------------------------------------


def _write(child: nn.Module, target: Path, shelf: DiskShelf, shard_size: int, growth: str) -> None:
    """Shards and their index, each with its header first; a shard that the same growth left whole is kept."""
    persistent = set(child.state_dict())
    tensors = [*child.named_parameters(), *((name, t) for name, t in child.named_buffers() if name in persistent)]
    shards = list(_shards(tensors, shard_size))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [_ONE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        part = target / _SCRATCH / name
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "growth": growth}}
        at = 0
        for key, tensor in shard:
            header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        there = target / name
        if there.exists() and there.stat().st_size == 8 + len(text) + at and _header(there) == header:
            continue
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in shard:
                _bytes(values_of(tensor)).tofile(file)
        shelf.let_go()
        part.replace(there)
    if len(shards) > 1:
        weights = {key: name for name, shard in zip(names, shards, strict=True) for key, _ in shard}
        total = sum(tensor.nbytes for _, tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        (target / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _stamp(source: Path) -> list[tuple[str, int, int]]:
    """What tells the files of a checkpoint from others of their names."""
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.glob("*.safetensors"))


def _shards(tensors: list[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
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


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        found: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return found


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
