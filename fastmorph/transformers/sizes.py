"""What configs of transformers call their sizes, and how a grown size is written into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fastmorph.errors import MorphError
from fastmorph.morphs.layer_numbers import configs_of

# What `grow` takes, and by which names configs hold it.
NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"),
    "intermediate_size": (
        "intermediate_size",
        "n_inner",
        "d_ff",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
    "vocab_size": ("vocab_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}


def configs(model: nn.Module) -> list[Any]:
    """Every config that some module keeps, and those inside of these, each once."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) not in found:
            found[id(config)] = config
            for key, value in vars(config).items():
                if key.endswith("config") and hasattr(value, "__dict__"):
                    add(value)

    for module in model.modules():
        for config in configs_of(module):
            add(config)
    return list(found.values())


def size_of(model: nn.Module, size: str) -> int | None:
    """The size as the model's config has it: the first of its configs that has one."""
    return next((value for config in configs(model) for value in _held(config, size)), None)


def _held(config: Any, size: str) -> Iterator[int]:
    for name in NAMES[size]:
        value = vars(config).get(name)
        if type(value) is int:
            yield value
    if size == "intermediate_size":
        width = next(_held(config, "hidden_size"), None)
        ratio = vars(config).get("mlp_ratio")
        if width is not None and type(ratio) in (int, float):
            yield int(width * ratio)
        elif width is not None and "n_inner" in vars(config) and config.n_inner is None:
            yield 4 * width


def implied(model: nn.Module, sizes: Mapping[str, int | None]) -> dict[str, int | None]:
    """All sizes of `NAMES`, None for those that stay, with what follows from a width.

    Code that says no size of a head divides the width by their number; a whole `mlp_ratio` says inner channels by it.
    """
    found = {name: sizes.get(name) for name in NAMES} | dict(sizes)
    width, new = size_of(model, "hidden_size"), sizes.get("hidden_size")
    if width is None or new is None or new <= width:
        return found
    config = width_config(model)
    if heads_divide_width(config):
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = next(_held(config, name), None)
            if heads and found[name] is None:
                found[name] = -(-heads * new // width)  # a width that does not divide is refused, by its layer
    if type(vars(config).get("mlp_ratio")) is int and found["intermediate_size"] is None:
        found["intermediate_size"] = new * config.mlp_ratio
    return found


def width_config(model: nn.Module) -> Any:
    """The config that says the width of the stream: of several, the first one."""
    return next((config for config in configs(model) if next(_held(config, "hidden_size"), None) is not None), None)


def heads_divide_width(config: Any) -> bool:
    """Whether a config leaves it to code to say how large a head is."""
    return config is not None and not {"head_dim", "d_kv", "attention_head_dim"} & vars(config).keys()


def rewrite(model: nn.Module, size: str, old: int, new: int, before: Mapping[str, tuple[int, ...]]) -> None:
    """Write a grown size wherever configs and modules keep the old one under its name.

    Of a model of several towers, each with a config: in those around some parameter that grew, by the shapes `before`.
    """
    held = [config for config in configs(model) if old in _held(config, size)]
    whole = {id(config) for config in held if len(held) == 1}
    around, grown = {"": whole}, set(whole)
    for path, module in model.named_modules():
        mine = {id(config) for config in configs_of(module) if any(config is other for other in held)}
        around[path] = around[path.rpartition(".")[0]] | mine
        for key, tensor in module._parameters.items():
            shape = before.get(f"{path}.{key}".removeprefix("."), ()) if tensor is not None else ()
            after = tensor.shape if tensor is not None else ()
            if any(one != two and one * new == two * old for one, two in zip(shape, after, strict=False)):
                grown |= around[path]
    modules = [module for path, module in model.named_modules() if around[path] & grown]
    for holder in (*(config for config in held if id(config) in grown), *modules):
        for name in NAMES[size]:
            if type(vars(holder).get(name)) is int and vars(holder)[name] == old:
                setattr(holder, name, new)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def say_heads(model: nn.Module) -> None:
    """Let configs say the size of a head that have it from the width and the number of heads, before these grow."""
    for config in configs(model):
        width, heads = (next(_held(config, size), 0) for size in ("hidden_size", "num_attention_heads"))
        if "head_dim" in vars(config) and config.head_dim is None and heads:
            config.head_dim = width // heads


def say_inner(model: nn.Module, inner: int) -> None:
    """Let configs that tell the inner channels of MLPs by the width say how many there are.

    Raises MorphError where one cannot.
    """
    for config in configs(model):
        held, width = vars(config), next(_held(config, "hidden_size"), 0)
        if type(held.get("mlp_ratio")) in (int, float) and width and int(width * held["mlp_ratio"]) != inner:
            ratio = inner // width if inner % width == 0 else inner / width
            if int(width * ratio) != inner:
                raise MorphError(
                    f"mlp_ratio of a {type(config).__name__} cannot say intermediate_size={inner} at width {width}."
                )
            try:
                config.mlp_ratio = ratio
            except Exception as error:  # of a config that takes whole numbers alone
                raise MorphError(
                    f"mlp_ratio={ratio} is none for a {type(config).__name__}: grow intermediate_size to a multiple of {width}."
                ) from error
        elif "n_inner" in held and held["n_inner"] is None and 4 * width != inner:
            config.n_inner = inner
