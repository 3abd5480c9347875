"""Vocabulary: an embedding gets rows for new ids, and the head a logit for each.

The logits of old ids stay what they are: that is the promise, and all that can be one, for whatever new ids have as a logit, a
softmax over more ids is another. A certificate compares old ids; so should whoever compares what is generated.

The head is found by reading a run backwards from the model's outputs with an entry an id: the product that makes them, tied to
the embedding or not, and the vectors that are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fastmorph.certify.readings import MoreIds
from fastmorph.elsewhere import values_of
from fastmorph.errors import MorphError
from fastmorph.graph.attributes import refresh
from fastmorph.graph.dataflow import Dataflow, Value, record
from fastmorph.graph.find import submodule_of, tensor_of
from fastmorph.graph.residual import MOVES, PRODUCTS, named
from fastmorph.graph.skeleton import ForwardError
from fastmorph.graph.trail import bare_skeleton, guess_call
from fastmorph.graph.twins import weight_dims
from fastmorph.morphs.layer_numbers import configs_of
from fastmorph.plan.memory import check_memory
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction


@dataclass(frozen=True)
class GrowVocabulary:
    """Give an embedding `size` rows, and the model's head as many logits, as data (the arguments of `grow_vocabulary`)."""

    embedding: str
    size: int

    @property
    def target(self) -> str:
        """The embedding."""
        return self.embedding

    def apply(self, transaction: Transaction) -> None:
        """Grow the embedding of `transaction.model`, in place."""
        model, name = transaction.model, self.embedding
        module = submodule_of(model, name)
        if not isinstance(module, nn.Embedding):
            raise _refusal(name, f"it is a {type(module).__name__} and no nn.Embedding", "name the embedding of ids")
        old = module.num_embeddings
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size <= old:
            raise _refusal(name, f"size={self.size!r} is no int above the {old} ids that it has", "ask for more")
        check_memory(f"embedding {name!r} of {self.size} ids", self.size * module.weight[0].nbytes, module.weight.device)
        transaction.settle()
        places = {f"{name}.weight": 0, **self._head(transaction, old)}
        noise = transaction.noise("vocabulary", name)
        done: set[int] = set()
        for path, dim in places.items():
            tensor = tensor_of(model, path)
            if id(tensor) not in done:
                new = self._grown(transaction, tensor, dim, noise.of(path))
                done.add(id(new))
                _update(model, new, old, self.size)
        for holder in [*model.modules(), *(config for part in model.modules() for config in configs_of(part))]:
            if vars(holder).get("vocab_size") == old and _reaches(holder, module):
                holder.vocab_size = self.size
        transaction.readings.append(MoreIds(old, self.size))

    def _head(self, transaction: Transaction, old: int) -> dict[str, int]:
        """By name, which dimension of each tensor of the head counts ids."""
        call = transaction.call or guess_call(transaction.model)
        if call is None:
            raise _refusal(self.embedding, "the model must be followed to find its head", "pass example_inputs=")
        try:
            flow = record(bare_skeleton(transaction.model), call, [])
        except ForwardError as error:
            raise MorphError(f"the model does not run on the example inputs: {error}.") from error
        found: dict[str, int] = {}
        for _, leaf in flow.outputs:
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[-1] == old and leaf.is_floating_point():
                found |= _makers(flow, flow.value(leaf), old)
        weight = f"{self.embedding}.weight"
        for node in flow.nodes[: flow.ended]:
            tied = any(flow.name(value) == weight for value in node.values())
            if tied and weight not in found and node.name not in ("embedding", "detach", "alias"):
                raise _refusal(
                    self.embedding, f"module {node.stack[-1]!r} takes its weight by {node.name}, too", "grow it by hand"
                )
        return found

    @torch.no_grad()
    def _grown(self, transaction: Transaction, old: Tensor, dim: int, noise: Any) -> Tensor:
        shape = [self.size - size if at == dim else size for at, size in enumerate(old.shape)]
        whole = [self.size if at == dim else size for at, size in enumerate(old.shape)]

        def made() -> Tensor:
            values = values_of(old)
            more = values.new_zeros(shape)
            if old.squeeze().ndim > 1:  # a vector's new entries are zero
                noise.fill(more, float(values.float().square().mean().sqrt()) or old.shape[-1] ** -0.5)
            return torch.cat([values, more], dim)

        new = transaction.compute(old, whole, made) if transaction.with_weights else old.detach().new_empty(whole)

        def padded(moment: Tensor, level: float) -> Tensor:
            return torch.cat([moment, moment.new_full(shape, level)], dim)

        return transaction.replace(
            old,
            new,
            linear=lambda moment: padded(moment, 0.0),
            square=lambda moment: padded(moment, float(moment.float().mean())),
        )


def _makers(flow: Dataflow, value: Value, old: int) -> dict[str, int]:
    """The tensors with an entry an id that make a value with one, and nothing else: a product's weight, and what is added."""
    node = flow.node(value)
    if node is None:
        return {}
    if node.name in PRODUCTS:
        found: dict[str, int] = {}
        sides = [node.operand(key) for key in PRODUCTS[node.name]]
        for place, side in enumerate(sides):
            weight = None if side is None else named(flow, side)
            if side is not None and weight is not None and place == len(sides) - 1:
                last = 0 if node.name in ("linear",) else -1
                found[weight[0]] = weight_dims(flow, side)[last]
        for key in ("bias", "self"):
            bias = node.operand(key)
            vector = None if bias is None or key in PRODUCTS[node.name] else named(flow, bias)
            if vector is not None:
                found[vector[0]] = 0
        return found
    if node.name not in MOVES and torch.Tag.pointwise not in node.call.func.tags:
        return {}
    found = {}
    for side in node.values():
        vector = named(flow, side)
        if vector is not None and side.tensor.shape[-1:] == (old,):
            found[vector[0]] = side.tensor.ndim - 1
        elif side.tensor.ndim and side.tensor.shape[-1] == old:
            found |= _makers(flow, side, old)
    return found


def _update(model: nn.Module, tensor: Tensor, old: int, new: int) -> None:
    """The numbers of the modules that hold a tensor."""
    for module in model.modules():
        if any(held is tensor for held in (*module._parameters.values(), *module._buffers.values())):
            refresh(module)
            if vars(module).get("nf") == old:  # transformers' Conv1D
                setattr(module, "nf", new)  # noqa: B010 - of no class that is known here


def _reaches(holder: Any, embedding: nn.Module) -> bool:
    return not isinstance(holder, nn.Module) or any(part is embedding for part in holder.modules())


def _refusal(name: str, cause: str, remedy: str) -> MorphError:
    return MorphError(f"the vocabulary of {name!r} cannot grow: {cause}; {remedy}.")


def grow_vocabulary(model: M, embedding: str, size: int, **options: Unpack[Options]) -> M:
    """Give an embedding rows for new ids, of noise as large as the old ones, and the head logits for them.

    Args:
        model: the parent; it is not touched.
        embedding: dotted name of an nn.Embedding of ids.
        size: how many ids there are to be.
        **options: those of `morph`, see `Options`; the head is found on `example_inputs`, guessed where there are none.

    Returns:
        The child: its logits of old ids are the parent's. Those of new ids are random, and may be the largest.

    Raises:
        MorphError: it is no embedding, the size is not larger, or its weight serves something else, too.
    """
    return grow(model, [GrowVocabulary(embedding, size)], options)


register_operator(GrowVocabulary, name="grow_vocabulary")
