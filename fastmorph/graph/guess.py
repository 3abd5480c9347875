"""Example inputs for a model that came without any: those that its first layer would take."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastmorph.errors import MorphError
from fastmorph.graph.record import Record
from fastmorph.graph.skeleton import Skeleton

_SIZES = (64, 32, 224, 28, 128, 299, 96, 256, 16, 8, 512, 1024, 4096, 16000)


def traced(skeleton: Skeleton, example_inputs: tuple[object, ...] | None) -> tuple[tuple[object, ...], Record]:
    """The inputs, guessed if there are none, and what a run on them found.

    Raises MorphError if the model does not run on them.
    """
    if example_inputs is not None:
        try:
            return example_inputs, skeleton.trace(example_inputs)
        except MorphError:
            raise
        except Exception as error:
            raise MorphError(f"the model cannot be traced on the example inputs: {type(error).__name__}: {error}.") from error
    first: Exception | None = None
    for inputs in _guesses(skeleton.model):
        try:
            return inputs, skeleton.trace(inputs)
        except MorphError:
            raise
        except Exception as error:  # wrong shape: the next guess
            first = first or error
    raise MorphError(
        f"the model's input could not be guessed from its first layer ({type(first).__name__}: {first}); pass example_inputs=."
    )


def _guesses(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    for module in model.modules():
        weight = module._parameters.get("weight")
        dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
        kind = next((dims[base] for base in dims if isinstance(module, base)), None)
        if weight is None:
            continue
        made = {"dtype": weight.dtype, "device": weight.device}
        if kind is not None:
            for size in _SIZES:
                yield (torch.zeros(2, module.in_channels, *[size] * kind, **made),)
            return
        if isinstance(module, nn.Linear):
            yield (torch.zeros(2, module.in_features, **made),)
            yield (torch.zeros(2, 16, module.in_features, **made),)
            return
        if isinstance(module, nn.Embedding):
            yield (torch.zeros(2, 16, dtype=torch.int64, device=weight.device),)
            return
