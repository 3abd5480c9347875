"""A checkpoint grown into a checkpoint: tensors come from the files one at a time, and what is made of them goes to files.

The plan is carried out on the architecture alone, whose weights are elsewhere (`fastmorph.elsewhere`): on disk. What is made of
a tensor is made when it is read, so that the plan alone tells what the output files hold: each is written from its header on,
and each tensor comes, grows and goes there once. The bits are those that `fastmorph.transformers.grow` makes in memory.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.recorded import certify, record
from fastmorph.elsewhere import values_of
from fastmorph.equation.randomness import draw_seed
from fastmorph.equation.solvers import Auto
from fastmorph.errors import MorphError
from fastmorph.inputs import as_call
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.parents import check_parent
from fastmorph.plan.plan import Plan
from fastmorph.plan.streamed import Streamed
from fastmorph.transformers.example import example_call, text_call
from fastmorph.transformers.files import INDEX, SCRATCH, DiskShelf, write_files
from fastmorph.transformers.grow import check_stock, say_sizes
from fastmorph.transformers.recipe import recipe
from fastmorph.transformers.sizes import implied, shapes_of, size_of

_SOLVING = {"solver": Auto(), "backend": None, "precision": None, "allow_inexact": False, "memory_budget": 2**31}


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
        verify: whether to load both models, one after the other, and compare them on English text, by the checkpoint's own
            tokenizer; without one, on ids in order.
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
    scratch = target / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shelf = DiskShelf(source, scratch)
    model, renamed = _architecture(source, shelf)
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
    transaction.structure = None  # it is as large as a tensor, and in circles
    gc.collect()
    shelf.let_go()
    child: Any = transaction.model
    say_sizes(child, sizes, olds, shapes)
    check_stock(child, None, {(olds[name], new) for name, new in sizes.items()})
    history = plan.recorded(transaction.resolved(), seed, as_call(call, model))
    told = json.dumps([history.to_toml(), sorted(map(str, shelf.names.items())), _stamp(source)])
    persistent = set(child.state_dict())
    tensors: dict[str, Tensor] = dict(
        [*child.named_parameters(), *((name, t) for name, t in child.named_buffers() if name in persistent)]
    )
    files: dict[str, str] = _file_names(child, tensors) if renamed else {}
    named = [(files.get(name, name), tensor) for name, tensor in tensors.items()]
    write_files(named, target, shelf, shard_size, hashlib.sha256(told.encode()).hexdigest())
    shutil.rmtree(scratch)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin") and file.name not in (INDEX, "config.json"):
            shutil.copyfile(file, target / file.name)
    child.config.save_pretrained(target)
    history.save(target / "growth.toml")
    if not verify:
        return history, None
    kind = type(child)
    parent = kind.from_pretrained(source).eval()
    call, on = text_call(parent, call, source)
    before = record(parent, call)
    del parent
    certificate = certify(before, kind.from_pretrained(target).eval(), call, transaction.readings)
    certificate = replace(certificate, on=", ".join(filter(None, (on, certificate.on))), where="")
    if not certificate:
        raise MorphError(f"the grown checkpoint does not compute what the other computes:\n{certificate}")
    return history, certificate


def _architecture(source: Path, shelf: DiskShelf) -> tuple[Any, bool]:
    """The model of a checkpoint, its weights elsewhere, and whether files have other names for tensors than its class.

    Raises MorphError where shapes are not its class's, or names neither that nor those that the class gives them as it saves.
    """
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
    known = {name: held[key] for where in places.values() for held, key, name in where}
    files = {} if known.keys() <= shelf.names.keys() else _file_names(model, known)
    for where in places.values():
        held, key, _ = where[0]
        old = held[key]
        stored = [file for *_, name in where for file in (name, files.get(name, name)) if file in shelf.names]
        name = stored[0] if stored else None
        if name is None or shelf.names[name][2] != tuple(old.shape):
            found = "is not there" if name is None else f"has the shape {shelf.names[name][2]}"
            raise MorphError(
                f"{where[0][2]!r} of a {kind.__name__}, of shape {tuple(old.shape)}, {found} in {source}: the class joins "
                "or cuts tensors as it loads them; load the model, and use fastmorph.transformers.grow."
            )
        used |= {file for *_, name in where for file in (name, files.get(name, name))}
        new: Any = shelf.stored(name)
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else values_of(new)
        for held, key, _ in where:
            held[key] = new
    spare = sorted(shelf.names.keys() - used)
    if spare:
        raise MorphError(f"{source} holds {spare[0]!r}, which a {kind.__name__} does not have; save it by save_pretrained.")
    return model, bool(files)


def _file_names(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a class calls tensors in the files that it saves, by their names in a model; without those that it joins or cuts."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, which saves them as they are
        return {}
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in shapes.items()}
    saved = revert_weight_conversion(model, shapes)
    return {names[id(tensor)]: file for file, tensor in saved.items() if id(tensor) in names}


def _stamp(source: Path) -> list[tuple[str, int, int]]:
    """What tells the files of a checkpoint from others of their names."""
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.glob("*.safetensors"))
