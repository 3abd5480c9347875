"""Example inputs for a model that came without any: those that its first layer would take."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError
from fastmorph.graph.record import Record
from fastmorph.graph.skeleton import ForwardError, Skeleton
from fastmorph.inputs import Inputs

_SIZES = {
    1: (64, 32, 128, 256, 512, 1024, 4096, 16000),
    2: (64, 32, 224, 28, 128, 256, 299, 331, 96, 512, 16, 8),
    3: (16, 32, 64),
}
_LENGTHS = 9  # of sequences that are tried


def traced(skeleton: Skeleton, example_inputs: Inputs | None, *, taped: bool = False) -> tuple[Inputs, Record]:
    """The inputs, guessed if there are none, and what a run on them found.

    Of guesses, one is preferred under which all parameters are used; and the model may as well be meant for inputs with a
    dimension more or less: where it runs on these, what is found there counts too.

    Raises MorphError if the model does not run on them.
    """
    if example_inputs is not None:
        tensors = [leaf for leaf in pytree.tree_leaves(tuple(example_inputs)) if isinstance(leaf, Tensor)]
        if tensors and not any(tensor.numel() for tensor in tensors):
            raise MorphError(
                "the example inputs are empty, and channels cannot be followed on nothing; pass at least one example."
            )
        try:
            return example_inputs, skeleton.trace(example_inputs, taped=taped)
        except ForwardError as error:
            raise MorphError(f"the model does not run on the example inputs: {error}.") from error
    first: Exception | None = None
    best: tuple[Inputs, Record] | None = None
    names = {name for name, _ in skeleton.model.named_parameters()}
    for inputs in guesses(skeleton.model):
        if best is not None and _only(inputs).ndim == _only(best[0]).ndim:  # a size more, which decides little
            continue
        try:
            found = inputs, skeleton.trace(inputs, also=_of_other_rank(inputs), taped=taped)
        except ForwardError as error:  # wrong shape: the next guess
            first = first or error
            continue
        if names <= found[1].used:
            return found
        best = best or found
    if best is not None:
        return best
    raise MorphError(
        f"the model's input could not be guessed from its first layer{f' ({first})' if first else ''}; pass example_inputs=."
    )


def _of_other_rank(inputs: Inputs) -> tuple[Inputs, ...]:
    """One image or sequence instead of a batch of them; sequences of vectors instead of vectors."""
    tensor = _only(inputs)
    if not tensor.is_floating_point():
        return ()
    other = tensor[0] if tensor.ndim > 2 else tensor[:, None].expand(-1, 17, -1)  # a length that no layer has
    return (Inputs(*pytree.tree_map(lambda _: other, tuple(inputs))),)


def _only(inputs: Inputs) -> Tensor:
    """The tensor of a guessed call."""
    (tensor,) = (*inputs.args, *inputs.kwargs.values())
    assert isinstance(tensor, Tensor)
    return tensor


def guesses(model: nn.Module) -> Iterator[Inputs]:
    """Calls that a model may take, by its first layer with a weight, in shapes and dtypes: on the meta device."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    keyword = parameters[0].name if parameters and parameters[0].kind is inspect.Parameter.KEYWORD_ONLY else None
    for tensor in _first_inputs(model):
        yield Inputs((tensor,), {}) if keyword is None else Inputs((), {keyword: tensor})


def _first_inputs(model: nn.Module) -> Iterator[Tensor]:
    module: Any
    for module in model.modules():
        weight = module._parameters.get("weight")
        dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
        kind = next((dims[base] for base in dims if isinstance(module, base)), None)
        if weight is None:
            continue
        made: dict[str, Any] = {"dtype": weight.dtype, "device": "meta"}
        if kind is not None:
            for channels in dict.fromkeys((module.in_channels, 3, 1)):
                for size in _SIZES[kind]:
                    yield torch.empty(2, channels, *[size] * kind, **made)
            return
        if isinstance(module, nn.Linear):
            yield torch.empty(2, module.in_features, **made)
            widths = [other.in_features for other in model.modules() if isinstance(other, nn.Linear)]
            for length in list(dict.fromkeys([16, *widths]))[:_LENGTHS]:  # a layer may mix the positions of a sequence
                yield torch.empty(2, length, module.in_features, **made)
            return
        if isinstance(module, nn.Embedding):
            yield torch.empty(2, 16, dtype=torch.int64, device="meta")
            return
