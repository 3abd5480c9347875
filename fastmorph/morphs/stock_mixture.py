"""A whole decoder of transformers as that package's own class with experts: Llama and Mistral as Mixtral, Qwen3 as Qwen3Moe.

The child is an instance of that class with a config of its own, which `save_pretrained` and `from_pretrained` know. Every MLP
becomes experts as the class holds them, stacked, gate and up in one parameter, behind a router of noise. All other parameters
are the parent's.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastmorph.equation.randomness import Stream
from fastmorph.morphs.copies import Copies
from fastmorph.plan.layers import refusal
from fastmorph.plan.transaction import Transaction

_QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
# Of each class, that with experts, its names for their number and their width, and what its config says besides.
_CLASSES: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "LlamaForCausalLM": ("MixtralForCausalLM", "num_local_experts", "intermediate_size", {}),
    "MistralForCausalLM": ("MixtralForCausalLM", "num_local_experts", "intermediate_size", {}),
    "Qwen3ForCausalLM": ("Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size", _QWEN),
}
_OWN = ("model_type", "architectures", "transformers_version", "layer_types", "max_window_layers")
_REMEDY = "name the MLPs instead, each of which becomes a fastmorph.nn.Mixture"


@torch.no_grad()
def put_stock_mixture(transaction: Transaction, experts: int, top_k: int) -> None:
    """Put a model of the class with experts in the place of the transaction's.

    Raises MorphError where there is no such class, or where it has no place for something that the model has.
    """
    model: Any = transaction.model
    new = _unfilled(model, experts, top_k)
    given, noise = dict(model.named_parameters(remove_duplicate=False)), transaction.noise("add_experts", "")
    used = set()
    for path, module in new.named_modules():
        used |= _take(model, path, module, given)
        if {"gate_up_proj", "down_proj"} <= module._parameters.keys():
            block = path.rpartition(".")[0]
            used |= _fill(transaction, new.get_submodule(block), block, given, noise.of(block), experts)
    missing = [name for name, parameter in new.named_parameters() if parameter not in transaction.lineage]
    left = missing + sorted(given.keys() - used)
    if left:
        raise refusal("", f"a {type(new).__name__} has no {left[0]!r}, or the model has none", _REMEDY)
    new.generation_config = getattr(model, "generation_config", None)
    new.train(model.training)
    transaction.model = new
    transaction.say(f"a {type(model).__name__} became a {type(new).__name__}")


def _unfilled(model: Any, experts: int, top_k: int) -> Any:
    """The class with experts, of the sizes of the model, on the meta device."""
    kind = type(model).__name__
    if kind not in _CLASSES or not type(model).__module__.startswith("transformers."):
        known = ", ".join(_CLASSES)
        raise refusal("", f"it is a {kind}, of which no class with experts is known (there is one of {known})", _REMEDY)
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise refusal("", "it has hooks, which the other class would not have", "remove them first, or " + _REMEDY)
    name, counted, width, more = _CLASSES[kind]
    config, cls = model.config, getattr(importlib.import_module("transformers"), name)
    if any("sliding" in str(layer) for layer in getattr(config, "layer_types", None) or ()) and "Mixtral" not in name:
        raise refusal("", f"some of its layers have a sliding window, which a {name} has in all or none", _REMEDY)
    fields = cls.config_class().to_dict().keys()
    values = {key: value for key, value in config.to_dict().items() if key in fields and key not in _OWN}
    values |= {**more, width: config.intermediate_size, counted: experts, "num_experts_per_tok": top_k}
    own = cls.config_class(**values)
    own._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        return cls(own)


def _take(model: Any, path: str, module: nn.Module, given: Mapping[str, nn.Parameter]) -> set[str]:
    """Give a module the parameters and buffers that the model's module of that name has; returns the parameters' names."""
    prefix = path and path + "."
    taken = {prefix + key for key, old in module._parameters.items() if old is not None} & given.keys()
    for name in taken:
        key = name.rpartition(".")[2]
        if module._parameters[key].shape != given[name].shape:  # type: ignore[union-attr]
            raise refusal("", f"{name!r} has another shape there", _REMEDY)
        module._parameters[key] = given[name]
    for key in module._buffers:
        module._buffers[key] = model.get_submodule(path)._buffers[key]
    return taken


def _fill(
    transaction: Transaction, block: nn.Module, path: str, given: Mapping[str, nn.Parameter], noise: Stream, experts: int
) -> set[str]:
    """The router and the stacked experts of an MLP; returns the names of the parameters that went into them."""
    gate, up, down = names = [f"{path}.{key}_proj.weight" for key in ("gate", "up", "down")]
    if not given.keys() >= set(names):
        raise refusal("", f"{path!r} is no MLP of gate, up and down projections", _REMEDY)
    held: Any = block
    near = given[down]
    router = near.new_empty(held.gate.weight.shape)
    if transaction.with_weights:
        noise.fill(router, router.shape[1] ** -0.5)
    both = torch.cat([given[gate], given[up]])  # (2 i, d)
    parts = {"gate_up_proj": (both, [given[gate], given[up]]), "down_proj": (near, [near])}
    for key, (matrix, old) in parts.items():
        stacked = nn.Parameter(matrix.expand(experts, *matrix.shape).clone(), requires_grad=old[0].requires_grad)
        held.experts._parameters[key] = new = transaction.keep(stacked)
        transaction.lineage.copied(new, old, Copies(experts, 1, stacked=True), Copies(experts, 2, stacked=True))
    held.gate.weight = transaction.keep(nn.Parameter(router, requires_grad=near.requires_grad))
    transaction.lineage.joined(held.gate.weight, near)
    for name in names:
        transaction.release(given[name])
    return set(names)
