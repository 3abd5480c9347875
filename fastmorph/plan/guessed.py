"""Values to compare two models on, where the caller gave none: random ones of the shapes and dtypes of a guessed call."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.certify.compare import coarsest_dtype
from fastmorph.certify.outputs import is_float
from fastmorph.certify.run import run
from fastmorph.errors import MorphError
from fastmorph.inputs import Inputs

_FEW = 2  # integers of an input among several, which may be a mask, are 0 or 1


def random_values(call: Inputs, model: nn.Module) -> Inputs | None:
    """A call of the same shapes and dtypes with random values, always the same; None if the model cannot be told by it.

    Integers are indices that every embedding of the model takes. A model can be told by its outputs if it runs, in its own
    dtype and in float64, and some output is a finite number.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    numbers = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    most = min(numbers, default=_FEW) if len(tensors) == 1 else _FEW
    generator = torch.Generator().manual_seed(0)
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))

    def filled(leaf: Tensor) -> Tensor:
        if is_float(leaf):
            value = torch.randn(leaf.shape, generator=generator, device="cpu")
        else:
            value = torch.randint(most, leaf.shape, generator=generator, device="cpu")
        return value.to(device if leaf.device.type == "meta" else leaf.device, leaf.dtype)

    values: Inputs = pytree.tree_map(lambda leaf: filled(leaf) if isinstance(leaf, Tensor) else leaf, call)
    own = coarsest_dtype([model], pytree.tree_leaves(values))
    try:
        for dtype in dict.fromkeys((own, torch.float64)):
            outputs = run(model, "parent", "eval", values, dtype).outputs.values()
            if not any(isinstance(leaf, Tensor) and bool(leaf.isfinite().any()) for leaf in outputs):
                return None
    except MorphError:  # other numbers of its inputs are asked for than can be guessed, or values that are related
        return None
    return values


def described(call: Inputs) -> str:
    """What a certificate says of such a call."""
    named = [*(("", value) for value in call.args), *((f"{name} ", value) for name, value in call.kwargs.items())]
    shapes = ", ".join(f"{name}{tuple(value.shape)}" for name, value in named if isinstance(value, Tensor))
    return f"random inputs of shape {shapes}"
