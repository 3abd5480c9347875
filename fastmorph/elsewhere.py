"""Tensors whose values are elsewhere, on other ranks or on disk: they come when an operator reads them, and go again.

A plan can so work on a model that no memory holds. An `Elsewhere` is a tensor to whoever uses it: shapes, dtypes and views cost
nothing, and any other operator fetches the values and computes with them. Its `Shelf` holds the values of one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError

_aten: Any = torch.ops.aten
_VIEWS = {
    *(_aten.detach.default, _aten.alias.default, _aten.view.default, _aten._unsafe_view.default),
    *(_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default),
}
Fetch = Callable[[], Tensor]


class Elsewhere(Tensor):
    """A tensor on a shelf. Its values cannot be written; `values` fetches them, and so does every operator but a view."""

    __slots__ = ("_fetch", "_shelf", "_views", "origin")
    _fetch: Fetch
    _shelf: Shelf
    _views: tuple[Callable[[Tensor], Tensor], ...]
    origin: Tensor | None  # the tensor that it stands for as a whole, where that is one, sharded say

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, shelf: Shelf, fetch: Fetch, views: tuple[Any, ...] = ()) -> Elsewhere:
        """A tensor like another one in all but its values; `views` lead to them from what is fetched."""
        self: Any = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, layout=like.layout, device=device
        )
        self._shelf, self._fetch, self._views, self.origin = shelf, fetch, views, None
        found: Elsewhere = self
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator: a view on the shape, any other one on the values."""
        kwargs = kwargs or {}
        if func in _VIEWS:
            old, *rest = args
            shape = func(torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="meta"), *rest, **kwargs)
            views = (*old._views, lambda values: func(values, *rest, **kwargs))
            new = Elsewhere(shape, old.device, old._shelf, old._fetch, views)
            new.origin = old.origin if func is _aten.detach.default else None
            return new
        given = [*zip(func._schema.arguments, args, strict=False), *((a, kwargs.get(a.name)) for a in func._schema.arguments)]
        if any(isinstance(value, cls) for a, value in given if a.alias_info is not None and a.alias_info.is_write):
            raise MorphError(f"{func} would write into a tensor whose values are elsewhere; put a new one in its place.")
        args, kwargs = pytree.tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)

    def values(self) -> Tensor:
        """The values, not to be written into."""
        with torch.no_grad():
            found = self._shelf.read(self._fetch)
            for view in self._views:
                found = view(found)
        return found

    def forget(self) -> None:
        """Let go of what the values are fetched from; the tensor cannot be read any more."""
        self._shelf.let_go()
        self._fetch, self.origin = _forgotten, None

    def numpy(self, *, force: bool = False) -> Any:
        """The values."""
        return self.values().numpy(force=force)

    def tolist(self) -> Any:
        """The values."""
        return self.values().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        new: Tensor = self.detach()
        if isinstance(self, nn.Parameter):
            new = nn.Parameter(new, self.requires_grad)
        memo[id(self)] = new
        return new

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Elsewhere(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


class Shelf(ABC):
    """Where tensors are put away. It holds the values of the one that was read last, and of no other.

    Attributes:
        late: whether what is computed from tensors may be computed when it is read, and each time that it is.
    """

    late = False

    def __init__(self) -> None:
        self._held: tuple[Fetch, Tensor] | None = None

    @abstractmethod
    def keep(self, value: Tensor) -> Tensor:
        """Put a tensor's values away, and return it as an `Elsewhere`; small ones may stay as they are."""

    def of(self, like: Tensor, device: torch.device, fetch: Fetch) -> Elsewhere:
        """A tensor on this shelf, of the shape, strides and dtype of `like`."""
        return Elsewhere(like, device, self, fetch)

    def read(self, fetch: Fetch) -> Tensor:
        """What is fetched, unless it is still here."""
        held = self._held
        if held is None or held[0] is not fetch:
            self._held = held = None  # before the next one comes
            self._held = held = (fetch, fetch())
        return held[1]

    def let_go(self) -> None:
        """Hold no values."""
        self._held = None


def _forgotten() -> Tensor:
    raise MorphError("these values were let go.")


def values_of(tensor: Tensor) -> Tensor:
    """A tensor's values, detached: fetched once, where they are elsewhere."""
    return tensor.values() if isinstance(tensor, Elsewhere) else tensor.detach()


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype on the meta device; a parameter for a parameter."""
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
