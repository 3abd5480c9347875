"""A plan for a transformer from the sizes that its config is to have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fastmorph.errors import MorphError
from fastmorph.morphs.add_experts import AddExperts
from fastmorph.morphs.add_heads import AddHeads
from fastmorph.morphs.grow_vocabulary import GrowVocabulary
from fastmorph.morphs.insert_block import InsertBlock
from fastmorph.morphs.widen import Widen
from fastmorph.plan.plan import Plan
from fastmorph.plan.transaction import Operator
from fastmorph.transformers.sizes import NAMES, configs, heads_divide_width, implied, size_of, width_config
from fastmorph.transformers.untie import Untie

# The layers, or weights, of MLPs that make their inner channels: one of each set that a product joins.
_UP = re.compile(
    r"(^|\.)(up_proj|gate_up_proj|c_fc|dense_h_to_4h|fc1|wi|wi_0|lin1|weights_in|linear1|intermediate\.dense|ff\.net\.0\.proj)$"
)
# Layers that make as many channels as the stream has, beside it, in heads of masked language models.
_BESIDE = re.compile(r"(^|\.)(predictions\.transform\.dense|lm_head\.dense|vocab_transform)$")
_QUERIES = ("q_proj", "query", "c_attn", "query_key_value", "qkv", "q", "q_lin", "Wqkv", "qkv_proj")


def blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of a model's blocks: those with attention inside that stand in no other such list."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{known}.") for known in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and any(_attention(module)):
            found[name] = module
    return found


def _attention(module: nn.Module) -> Iterator[str]:
    """The modules of attention inside of a module: those that make queries."""
    for name, part in module.named_modules():
        if any(isinstance(getattr(part, key, None), nn.Module) for key in _QUERIES) and "ttention" in type(part).__name__:
            yield name


def recipe(model: nn.Module, sizes: Mapping[str, int | None], fill: str | None = None, *, untie: bool = False) -> Plan:
    """The plan that gives a model's config these sizes, widths of every layer alike.

    Args:
        model: the parent.
        sizes: what the config is to have, by the names of `grow`; None: as it is.
        fill: what new channels, heads and blocks begin with, see `grow`.
        untie: give the head a weight of its own first.

    Raises MorphError for a size that the config does not have, or a smaller one.
    """
    wanted = {name: size for name, size in implied(model, sizes).items() if size is not None}
    olds = {name: _checked(model, name, size) for name, size in wanted.items()}
    wanted = {name: size for name, size in wanted.items() if size != olds[name]}
    if not wanted and not untie:
        raise MorphError("nothing is to grow: give a size that is larger than the model's.")
    inner = "pair" if fill in (None, "rotate") else str(fill)
    operators: list[Operator] = []
    lists = blocks(model)
    if "vocab_size" in wanted:
        operators.append(GrowVocabulary(_embedding(model), wanted["vocab_size"]))
    if untie:  # behind that, which biases beside a head follow while they are tied
        operators.append(Untie(_head(model)))
    if "hidden_size" in wanted:
        along = fill in (None, "zero", "rotate") and _divides(model, olds, wanted)
        operators.append(Widen(_stream(model), wanted["hidden_size"], fill or "zero", heads=along))
        beside = (name for name, _ in model.named_modules() if _BESIDE.search(name))
        operators += [Widen(name, wanted["hidden_size"], inner) for name in beside]
        for name in ("num_attention_heads", "num_key_value_heads") if along else ():
            wanted.pop(name, None)
    if "num_attention_heads" in wanted or "num_key_value_heads" in wanted:
        heads, groups = _heads(model, wanted)
        for name, layers in lists.items():
            operators += [AddHeads(".".join(filter(None, (name, part))), heads, groups, inner) for part in _attention(layers)]
    if "intermediate_size" in wanted:
        operators += _wider(lists, olds["intermediate_size"], wanted["intermediate_size"], inner)
    if "num_experts" in wanted:
        operators.append(_experts(model, olds["num_experts"], wanted["num_experts"]))
    if "num_hidden_layers" in wanted:
        operators += _deeper(lists, olds["num_hidden_layers"], wanted["num_hidden_layers"], inner)
    return Plan(operators)


def _divides(model: nn.Module, olds: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    """Whether code divides the width by the number of heads, which grow with it. Raises MorphError for other heads."""
    if not heads_divide_width(width_config(model)):
        return False
    old, new = olds["hidden_size"], wanted["hidden_size"]
    for name in wanted.keys() & {"num_attention_heads", "num_key_value_heads"}:
        if wanted[name] != -(-olds[name] * new // old):
            raise MorphError(
                f"{name}={wanted[name]}: the code of a {type(model).__name__} divides the width by the number of heads: "
                f"{olds[name]} of them at {old} channels are {olds[name] * new / old:g} at hidden_size={new}; leave {name} out."
            )
    return True


def _checked(model: nn.Module, name: str, size: Any) -> int:
    """The size that the model has now."""
    if name not in NAMES:
        raise MorphError(f"{name!r} is no size of a transformer that can grow; it takes {', '.join(NAMES)}.")
    if isinstance(size, bool) or not isinstance(size, int):
        raise MorphError(f"{name}={size!r} must be an int.")
    old = size_of(model, name)
    if old is None and name == "num_experts":
        return 1
    if old is None:
        raise MorphError(f"the config of a {type(model).__name__} says no {name}, so that it cannot be made larger.")
    if size < old:
        raise MorphError(f"{name}={size} is less than the model's {old}: networks grow, and never shrink.")
    return old


def _heads(model: nn.Module, wanted: Mapping[str, int]) -> tuple[int, int | None]:
    """How many query heads there are to be, and of keys and values: as many as now, or one to each query head as now."""
    heads, groups = (size_of(model, name) for name in ("num_attention_heads", "num_key_value_heads"))
    each = groups == heads
    heads = wanted.get("num_attention_heads", heads)
    return heads or 0, heads if each else wanted.get("num_key_value_heads", groups)


def _input(model: Any) -> nn.Module:
    """What embeds the model's input; of a model of several, what embeds ids."""
    try:
        found: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        count = size_of(model, "vocab_size")
        tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part.num_embeddings == count)
        found = next(tables)
    return found


def _embedding(model: nn.Module) -> str:
    embedding = _input(model)
    return next(name for name, module in model.named_modules() if module is embedding)


def _head(model: Any) -> str:
    head = model.get_output_embeddings()
    found = [name for name, module in model.named_modules() if module is head and head is not None]
    if not found:
        raise MorphError(f"a {type(model).__name__} has no head of its own to untie.")
    return found[0]


def _stream(model: nn.Module) -> str:
    """A layer that writes the stream: what embeds ids, or patches."""
    embedding = _input(model)
    if any(True for _ in embedding.parameters(recurse=False)):
        return _embedding(model)
    inside = _embedding(model)
    layer = next(name for name, module in embedding.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return f"{inside}.{layer}"


def _wider(lists: Mapping[str, nn.ModuleList], old: int, new: int, fill: str) -> Iterator[Operator]:
    found = False
    for name, layers in lists.items():
        for weight, parameter in layers.named_parameters():
            part = weight.removesuffix(".weight")
            if _UP.search(part) and old * (2 if "gate_up" in part else 1) in parameter.shape:
                found = True
                yield Widen(f"{name}.{part}", new * (2 if "gate_up" in part else 1), fill)
    if not found:
        raise MorphError(
            f"no layer makes the {old} inner channels of an MLP under a name that is known; widen them by their names, "
            "fm.Widen('...mlp.up', channels)."
        )


def _experts(model: nn.Module, old: int, experts: int) -> AddExperts:
    if size_of(model, "num_experts") is None:
        return AddExperts("", experts)
    if experts % old:
        raise MorphError(f"num_experts={experts} is no multiple of the model's {old}: all experts get equally many copies.")
    chosen = (vars(config).get("num_experts_per_tok") for config in configs(model))
    return AddExperts("", experts, next(filter(None, chosen), 1) * (experts // old))


def _deeper(lists: Mapping[str, nn.ModuleList], old: int, new: int, fill: str) -> Iterator[Operator]:
    """New blocks spread evenly, the last first, so that names before them stay."""
    found = False
    for name, layers in lists.items():
        if len(layers) == old:
            found = True
            more = new - old
            places = [(number + 1) * old // more - 1 if more <= old else number * old // more for number in range(more)]
            for place in reversed(places):
                yield InsertBlock(f"{name}.{max(0, place)}", fill if fill in ("pair", "zero") else "pair")
    if not found:
        raise MorphError(
            f"no list of blocks with attention has the {old} that the config counts; insert them by fm.InsertBlock."
        )
