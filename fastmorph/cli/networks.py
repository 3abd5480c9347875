"""What the command line names: modules are imported, factories called, files read, and nothing is unpickled."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import operator
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class CommandError(Exception):
    """A command cannot be carried out; the message says why and what to do, in a sentence."""


def need(*modules: str) -> None:
    """Raise CommandError, with the remedy, if one of these modules is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"{' and '.join(missing)} cannot be imported; install with pip install 'fastmorph-torch[demo]'.")


def load_morphs(modules: Iterable[str]) -> None:
    """Let third-party morphs register: import what the entry points "fastmorph.morphs" name, and these modules."""
    for entry in importlib.metadata.entry_points(group="fastmorph.morphs"):
        with others_code(f"the entry point {entry.name} = {entry.value} of fastmorph.morphs"):
            entry.load()
    for module in modules:
        with others_code(f"--import {module}"):
            importlib.import_module(module)


def make_network(spec: str) -> nn.Module:
    """Call the factory that "package.module:factory" names."""
    from torch import nn

    module, _, factory = spec.partition(":")
    if not module or not factory:
        raise CommandError(f"--model {spec} must read package.module:factory.")
    with others_code(f"--model {spec}"):
        network = operator.attrgetter(factory)(importlib.import_module(module))()
    if not isinstance(network, nn.Module):
        raise CommandError(f"--model {spec} must return a torch.nn.Module, not a {type(network).__name__}.")
    return network


@contextmanager
def others_code(what: str) -> Iterator[None]:
    """Run code that the command line names, searching the current directory last. Raises CommandError if it fails or exits."""
    if os.getcwd() not in sys.path:  # python -m has it there, the installed command has not
        sys.path.append(os.getcwd())
    try:
        yield
    except BaseException as error:  # SystemExit too
        raise CommandError(f"{what} failed with {told(error)}.") from error


def told(error: BaseException) -> str:
    """An error's kind and message."""
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def load_weights(network: nn.Module, path: Path) -> None:
    """Set all parameters and buffers of a network from a file; tied ones may be stored once."""
    import torch

    found, own = read_tensors(path), network.state_dict()
    there = {tensor.data_ptr() for name, tensor in own.items() if name in found} - {0}
    faults = [f"it lacks {name}" for name, tensor in own.items() if name not in found and tensor.data_ptr() not in there]
    faults += [f"it has {name}, which the network has not" for name in found if name not in own]
    for name in found.keys() & own.keys():
        held, wanted = found[name], own[name]
        if held.shape != wanted.shape:
            faults.append(f"{name} is {shape_text(held.shape)} there and {shape_text(wanted.shape)} in the network")
        elif torch.promote_types(held.dtype, wanted.dtype) != wanted.dtype:
            faults.append(f"{name} is {held.dtype} there and would be rounded to {wanted.dtype}")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CommandError(f"{path} does not fit the network: {', '.join(faults[:3])}{more}.")
    network.load_state_dict(found, strict=False)  # what it may lack is tied to what it has


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors in a safetensors file or one that `torch.save` wrote, without running anything stored in it."""
    import torch

    with path.open("rb"):  # a file that cannot be opened is told from one that cannot be read
        pass
    try:
        if path.suffix == ".safetensors":
            need("safetensors")
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(
            f"{path} is not a whole {'safetensors file' if path.suffix == '.safetensors' else 'PyTorch file of tensors alone'} "
            "(name safetensors files *.safetensors; files that hold other Python objects are never unpickled)."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CommandError(f"{path} must hold a state dict, a name and a tensor each; save model.state_dict().")
    return dict(found)


def shape_text(shape: Iterable[int]) -> str:
    """Write a shape as people do, 3x4x5."""
    return "x".join(map(str, shape)) or "()"
