"""How one run of a model computes: in float64 where that is asked for, and without a write into the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmorph.certify.outputs import is_float, widened

_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16"}
_FACTS = {"size", "dim", "numel", "stride", "is_contiguous", "data_ptr", "element_size", "__len__"}
_FACTS |= {"is_floating_point", "is_complex"}

_BLOCK = 2**18  # entries of a linear layer's weight that are cast at a time


class WeightsChanged(BaseException):
    """A forward is about to write into a weight that it shares with the model. No error, so that no forward catches it."""


class Arithmetic(TorchFunctionMode):
    """Takes every call of a PyTorch function that this thread makes while a model runs.

    - `weights` are shared with the model, so a call that may write into one raises `WeightsChanged` before it does.
    - Where `dtype` is float64, a weight is cast to it for the one call that uses it, and what forward makes without naming a
      dtype is float64 too.
    - Where forward itself asks for fewer bits than `dtype`, it gets them, with weights in their own dtype: an island.
    - Where `shaken`, each value that enters an island is moved by one unit in the last place, up or down at random
      (Monte Carlo arithmetic: Parker, 1997), which measures how the outputs follow the island's rounding.

    An active mode also keeps PyTorch from the fused paths of nn.MultiheadAttention and nn.TransformerEncoder.
    """

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype, *, shaken: bool = False) -> None:
        super().__init__()
        kept = list(weights)
        self.shaken, self.islands = shaken, 0
        self._exact, self._eps = dtype == torch.float64, torch.finfo(dtype).eps
        self._weights = {id(weight): weight for weight in kept}
        self._storages = {weight.untyped_storage().data_ptr() for weight in kept if weight.numel()}
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` in the run's arithmetic."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self._weights:
            self._guard(func, name, args, kwargs)
        if name == "__get__" or name in _FACTS:
            return self._fact(func, args, kwargs)
        floats = [t for t in _tensors((args, kwargs)) if is_float(t) and id(t) not in self._weights]
        if self._exact:
            args, kwargs, out = self._in_float64(func, args, kwargs, floats)
        else:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and self._coarse(out) and not any(out is t for t in _tensors((args, kwargs))):
            return self._narrow(out, name, args, kwargs, floats)
        return out

    def _guard(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `WeightsChanged` for a call that writes into a weight, or hands out one that PyTorch does not watch."""
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        in_place |= name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")
        if in_place:
            written: Any = args[:1]
        elif func in (F.embedding, F.embedding_bag):
            written = args if _renormalises(args, kwargs) else ()
        elif name == "numpy" or (name == "__get__" and func.__self__ is torch.Tensor.data):
            written = args
        else:  # F.relu(x, True) is in place too
            inplace = kwargs.get("inplace") or (len(args) > 1 and any(a is True for a in args[1:]))
            written = (kwargs.get("out"), args[0] if inplace else None)
        if any(self._shared(tensor) for tensor in _tensors(written)):
            raise WeightsChanged(f"{name} on a weight")

    def _shared(self, tensor: Tensor) -> bool:
        if id(tensor) in self._weights:
            return True
        return tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in self._storages

    def _fact(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A property of a tensor; a weight's dtype is what it will be cast to."""
        found = func(*args, **kwargs)
        if not self._exact or id(args[0]) not in self._weights:
            return found
        if isinstance(found, torch.dtype):
            return widened(torch.empty(0, dtype=found)).dtype
        return widened(found) if isinstance(found, Tensor) else found

    def _in_float64(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], floats: list[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """The arguments and the result of a call, its weights cast unless it computes on numbers of an island."""
        weights = [t for t in _tensors((args, kwargs)) if id(t) in self._weights]
        island = bool(floats) and all(self._coarse(t) for t in floats)
        if func is F.linear and not any(self._coarse(t) for t in floats) and any(w.numel() > _BLOCK for w in weights):
            return args, kwargs, _linear(*args, **kwargs)
        if weights and not island and func is not F.embedding:  # whose rows are cast when they are taken
            args, kwargs = _mapped((args, kwargs), lambda t: widened(t) if id(t) in self._weights else t)
        return args, kwargs, _called(func, args, kwargs)

    def _narrow(self, out: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], floats: list[Tensor]) -> Tensor:
        """A result in fewer bits than the run's: widened where forward did not ask for them, else that of an island."""
        named = name in _CASTS or any(isinstance(leaf, torch.dtype) for leaf in _leaves((args, kwargs)))
        if self._exact and not floats and not named:
            return widened(out)
        self.islands += 1
        if not self.shaken or all(self._coarse(t) for t in floats):
            return out
        moved = out * (1 + torch.finfo(out.dtype).eps * self._signs(out))
        stays = ~moved.isfinite()
        if name in _CASTS:  # a number that fits is not rounded
            stays |= out.to(args[0].dtype) == args[0]
        return torch.where(stays, out, moved)

    def _coarse(self, tensor: Tensor) -> bool:
        return is_float(tensor) and torch.finfo(tensor.dtype).eps > self._eps

    def _signs(self, like: Tensor) -> Tensor:
        generator = self._generators.setdefault(like.device, torch.Generator(like.device).manual_seed(0))
        coins = torch.randint(2, like.shape, generator=generator, device=like.device)
        return (2 * coins - 1).to(like.dtype.to_real())


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call, by plain arithmetic where PyTorch would fuse, and with one dtype where `func` takes no two."""
    if func is F.scaled_dot_product_attention:
        return _attention(*args, **kwargs)
    if func is F.multi_head_attention_forward:  # it fuses unless it is asked for the weights of attention
        out, weights = func(*args, **{**kwargs, "need_weights": True})
        return out, weights if kwargs.get("need_weights", True) else None
    if getattr(func, "__name__", "") == "_grouped_mm" and args[0].dtype == torch.float64:
        return _grouped_product(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        dtypes = {t.dtype for t in _tensors((args, kwargs)) if is_float(t)}
        if len(dtypes) < 2 or torch.float64 not in dtypes:
            raise
    args, kwargs = _mapped((args, kwargs), widened)  # a product of float64 and a constant of forward's own
    return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in float64, some rows of the weight at a time: no more is cast than stays in cache."""
    blocks = weight.split(max(1, _BLOCK // weight.shape[1]))
    out = torch.cat([F.linear(input, widened(block)) for block in blocks], -1)  # (*, out_features)
    return out if bias is None else out + widened(bias)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by its definition; `torch.nn.attention.sdpa_kernel` would choose for every thread."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def _grouped_product(one: Tensor, two: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """(rows, k) @ (groups, k, n), each group's rows up to its offset by its own matrix, which PyTorch has not in float64."""
    groups = one[: int(offs[-1])].tensor_split(offs[:-1].long().cpu())
    out = torch.cat([rows @ matrix for rows, matrix in zip(groups, two, strict=True)])
    return torch.cat([out, out.new_zeros(len(one) - len(out), out.shape[1])])


def _renormalises(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether F.embedding or F.embedding_bag bounds the norm of its rows, which it does in place."""
    return kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None)


def _leaves(value: Any) -> Iterator[Any]:
    """What the arguments of a call hold, with lists, tuples and dicts opened."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, function) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
