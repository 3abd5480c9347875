"""Grown networks from disk, as they stood."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastmorph.checkpoint.save import INDEX, VERSION
from fastmorph.checkpoint.training import Make, revive
from fastmorph.checkpoint.values import decode
from fastmorph.errors import MorphError
from fastmorph.plan.morph import restructure
from fastmorph.plan.plan import Plan


@dataclass(frozen=True)
class Loaded:
    """What `load` found.

    Attributes:
        model: the network, in the mode in which its factory makes it.
        optimizer: as it was saved; None if none was.
        scheduler: as it was saved; None if none was.
        plans: the growths that made the network, in order; `history(model)` says them too.
        certificate: what `Certificate.to_dict` gave at its birth; None if none was saved.
    """

    model: nn.Module
    optimizer: Optimizer | None
    scheduler: Any
    plans: tuple[Plan, ...]
    certificate: dict[str, Any] | None


def load(
    path: str | Path,
    model_factory: Callable[[], nn.Module] | nn.Module,
    *,
    optimizer: Make | None = None,
    scheduler: Make | None = None,
    example_inputs: Any = None,
) -> Loaded:
    """Read what `save` wrote.

    Args:
        path: the file or the directory.
        model_factory: builds the first parent, the network before any growth, with any weights; or such a network, which is not
            touched.
        optimizer: called with the parameter groups, a list of dicts, to make the optimizer, whose options and state are then
            set; needed where its class is not one of `torch.optim`'s.
        scheduler: called with the optimizer to make the scheduler, whose state is then set; needed where its class is not one
            of `torch.optim.lr_scheduler`'s, or has others or functions inside.
        example_inputs: as in `restructure`, where a plan has not recorded the shapes that it needs.

    Returns:
        The model on the devices of the factory's, with the dtypes of the file, its optimizer and scheduler.

    Raises:
        MorphError: the file was not written by `save`, or does not fit what the factory builds.
        ModuleNotFoundError: safetensors is not installed.
    """
    tensors, about = _read(Path(path))
    plans = tuple(map(Plan.from_toml, about["plans"]))
    model = model_factory if isinstance(model_factory, nn.Module) else model_factory()
    for plan in plans or (Plan(()),):  # at least a copy
        model = restructure(model, plan, example_inputs=example_inputs)
    extra = decode(about["extra"], tensors)
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(".")} | extra
    found |= {name: found[kept] for name, kept in about["aliases"].items()}
    _fill(model, found, path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in about["frozen"])
    made = revive(about, tensors, model, optimizer, scheduler)
    return Loaded(model, *made, plans, about["certificate"])


@torch.no_grad()
def _fill(model: nn.Module, found: Mapping[str, Any], path: str | Path) -> None:
    """Set all weights and buffers, in the file's dtypes. Raises MorphError where they do not fit."""
    own = model.state_dict(keep_vars=True)
    faults = [f"it lacks {name}" for name in own if name not in found]
    faults += [f"it has {name}, which the network has not" for name in found if name not in own]
    for name in found.keys() & own.keys():
        held, wanted = found[name], own[name]
        if isinstance(held, Tensor) and isinstance(wanted, Tensor) and held.shape != wanted.shape:
            faults.append(f"{name} has the shape {tuple(held.shape)} there and {tuple(wanted.shape)} in the network")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise MorphError(
            f"{path} does not fit the network: {', '.join(faults[:3])}{more}. The factory must build the first parent, as it "
            "was before any growth."
        )
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.dtype != found[name].dtype:
            tensor.data = tensor.data.to(found[name].dtype)
    model.load_state_dict(dict(found))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors, by name, and what `save` noted beside them."""
    from safetensors import SafetensorError, safe_open

    index = path / INDEX if path.is_dir() else None
    try:
        noted = {} if index is None else json.loads(index.read_text(encoding="utf-8"))
        files = [path] if index is None else [path / file for file in sorted(set(noted["weight_map"].values()))]
        tensors: dict[str, Tensor] = {}
        metadata: Mapping[str, str] = noted.get("metadata", {})
        for file in files:
            with safe_open(file, framework="pt") as opened:
                metadata = metadata or opened.metadata() or {}
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        about = json.loads(metadata["fastmorph"])
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, KeyError) as error:
        raise MorphError(
            f"{path} was not written by fastmorph.save, or is not whole: {type(error).__name__}: {error}."
        ) from error
    if about["version"] != VERSION:
        raise MorphError(
            f"{path} was written in version {about['version']} of fastmorph's format; this fastmorph reads {VERSION}."
        )
    return tensors, about
