"""Bags of inputs: dicts, lists and (named) tuples in one another, given to a model as one argument.

Which keys of a dict a model could be given besides is known by its looking for them in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from fastmorph.inputs import Inputs
from fastmorph.outputs import Path


def put(bag: Any, path: Path, new: Any) -> Any:
    """The bag with something else at a place; a key of a dict goes if that is None."""
    if not path:
        return new
    key: Any = path[0]
    if isinstance(bag, dict):
        item = put(bag.get(key), path[1:], new)
        return {**bag, key: item} if item is not None else {name: held for name, held in bag.items() if name != key}
    if _is_named(bag):
        return bag._replace(**{key: put(getattr(bag, key), path[1:], new)})
    return type(bag)([put(item, path[1:], new) if place == key else item for place, item in enumerate(bag)])


def given_options(args: tuple[Any, ...]) -> list[Path]:
    """Tensors that may be left out: fields whose default is None, and what is not alone in a dict."""
    found: list[Path] = []
    for path, bag in _inner(args):
        keys = bag._field_defaults if _is_named(bag) else bag if isinstance(bag, dict) and len(bag) > 1 else ()
        options = (key for key in keys if not _is_named(bag) or keys[key] is None)
        found += [(*path, key) for key in options if isinstance(dict(_items(bag))[key], Tensor)]
    return found


def open_options(args: tuple[Any, ...]) -> list[Path]:
    """Fields of named tuples that hold None."""
    return [(*path, key) for path, bag in _inner(args) if _is_named(bag) for key, item in _items(bag) if item is None]


def told(path: Path, names: Sequence[str]) -> str:
    """A place among a model's arguments of these names, as errors name it."""
    first = names[path[0]] if isinstance(path[0], int) and path[0] < len(names) else "input"
    return first + "".join(f"[{key!r}]" for key in path[1:])


def noting(call: Inputs) -> tuple[Inputs | None, dict[Path, None]]:
    """The call with dicts that note what a model looks for in vain, and the places where it did, once it has run.

    None where there are no dicts.
    """
    found: dict[Path, None] = {}
    if not any(type(bag) is dict for _, bag in _inner(call.args)):
        return None, found
    return Inputs(_noted(call.args, (), found.setdefault), call.kwargs), found


class _Asked(dict[Any, Any]):
    """A dict that notes the keys that code looks for in vain."""

    def __init__(self, items: dict[Any, Any], note: Callable[[Any], None]) -> None:
        super().__init__(items)
        self._note = note

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        if not found:
            self._note(key)
        return found

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:  # which is noted
            return default
        return self[key]


def _noted(bag: Any, path: Path, note: Callable[[Path], None]) -> Any:
    items = {key: _noted(item, (*path, key), note) for key, item in _items(bag)}
    if type(bag) is dict:
        return _Asked(items, lambda key: note((*path, key)))
    if _is_named(bag):
        return type(bag)(**items)
    return type(bag)(items.values()) if type(bag) in (list, tuple) else bag


def _inner(bag: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All bags inside one, and where they are."""
    for key, item in _items(bag):
        if isinstance(item, dict | list | tuple):
            yield (*path, key), item
            yield from _inner(item, (*path, key))


def _items(bag: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(bag, dict):
        return bag.items()
    if _is_named(bag):
        return zip(bag._fields, bag, strict=True)
    return enumerate(bag) if isinstance(bag, list | tuple) else ()


def _is_named(bag: Any) -> bool:
    return isinstance(bag, tuple) and hasattr(bag, "_fields")
