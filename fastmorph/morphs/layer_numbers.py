"""Numbers by which code counts and tells the layers of a list, brought in line with a new one.

Layers know their place (`layer_idx`, by which a cache of keys and values is asked), and a config how many there are
(`num_hidden_layers`) and of which type each is (`layer_types`). What is such a number is told by its name and by its value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_COUNTS = frozenset(
    {
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
        *("num_encoder_layers", "num_decoder_layers", "depth", "num_blocks", "n_blocks"),
    }
)
_PLACES = ("idx", "index", "layer_id", "layer_num", "layer_number", "block_id")
_CONFIGS = ("config", "cfg", "args", "hparams")
_SIDES = ("encoder", "decoder")


def renumber(old: list[nn.Module], new: list[nn.Module]) -> None:
    """Give layers the places that they have in `new`, where their numbers told their places in `old`; see `_PLACES`."""
    places: dict[tuple[str, str], set[int]] = {}
    for place, layer in enumerate(old):
        for path, part in layer.named_modules():
            for key, value in vars(part).items():
                if type(value) is int and not key.startswith("_") and any(word in key for word in _PLACES):
                    places.setdefault((path, key), set()).add(value - place)
    for (path, key), offsets in places.items():
        if len(offsets) == 1:
            (offset,) = offsets
            for place, layer in enumerate(new):
                part = dict(layer.named_modules()).get(path)
                if part is not None and type(vars(part).get(key)) is int:
                    setattr(part, key, place + offset)


def recount(model: nn.Module, layers: str, count: int, place: int, template: int) -> None:
    """Count a new layer: in the modules around the list, and in their configs.

    Args:
        model: the model.
        layers: dotted name of the list.
        count: how many layers there were.
        place: where the new one stands.
        template: where the one stood whose type it has.
    """
    side = next((word for word in _SIDES if word in layers), None)
    done: set[int] = set()
    for holder, nearest in _holders(model, layers):
        if id(holder) in done:
            continue
        done.add(id(holder))
        held = vars(holder)
        named = [key for key in held if key in _COUNTS and type(held[key]) is int]
        own = [key for key in named if side is not None and side in key]
        others = [key for key in named if not any(word in key for word in _SIDES)]
        for key in own + (others if not own or side == _SIDES[0] or nearest else []):
            if held[key] == count:
                setattr(holder, key, count + 1)
        for key, value in list(held.items()):
            if type(value) in (list, tuple) and len(value) == count and "layer" in key and not key.startswith("_"):
                setattr(holder, key, type(value)([*value[:place], value[template], *value[place:]]))


def _holders(model: nn.Module, layers: str) -> Iterator[tuple[Any, bool]]:
    """The modules around a list, the innermost first, and their configs; and whether a config is of these alone."""
    path = layers.split(".")[:-1]
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    whole = {id(config) for config in configs_of(model)}
    for module in around:
        yield module, True
        for config in configs_of(module):
            yield config, id(config) not in whole


def configs_of(module: nn.Module) -> list[Any]:
    """The configs that a module keeps."""
    held = [value for key, value in vars(module).items() if key in _CONFIGS]
    return [value for value in held if hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor)]
