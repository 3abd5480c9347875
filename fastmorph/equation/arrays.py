"""Arrays of any library in, the same kind out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmorph.errors import MorphError

Restore = Callable[[Tensor], Any]
_AT_HAND = frozenset({"cpu"})  # devices that have done what they were asked before the next line runs


def host_waits(device: torch.device) -> bool:
    """Whether to read a value on `device` holds the host up until the device has done all that it was asked before."""
    return device.type not in _AT_HAND


def refuse_transforms(tensor: Tensor, function: str) -> None:
    """Raise MorphError for a tensor inside torch.func's grad, vmap and the like, where values cannot be looked at."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise MorphError(
            f"{function} cannot run inside torch.func transforms (grad, vmap, ...): it decides by values, and no gradient "
            "flows through its answer. Call it outside; fastmorph.compose is differentiable."
        )


def times_power_of_two(tensor: Tensor, exponents: Sequence[int]) -> Tensor:
    """Each item of (B, ...) times 2 to its exponent, exact where the result is a normal number."""
    for some in ([e // 2 for e in exponents], [e - e // 2 for e in exponents]):  # either power alone is representable
        powers = torch.tensor([2.0**e for e in some], dtype=torch.float64).to(tensor)
        tensor = tensor * powers.view(-1, *(1,) * (tensor.ndim - 1))
    return tensor


def to_tensor(array: Any, name: str) -> tuple[Tensor, Restore]:
    """View `array` as a tensor; the second result turns tensors back into the array's own kind.

    Raises MorphError if it is neither a tensor, a numpy array nor a DLPack exporter, or not of a real floating dtype.
    """
    restore: Restore
    if isinstance(array, Tensor):
        tensor, restore = array, lambda tensor: tensor
    elif isinstance(array, np.ndarray):
        # torch takes neither read-only memory, nor negative strides, nor foreign byte order: those are copied.
        plain = array.flags.writeable and min(array.strides, default=0) >= 0 and array.dtype.isnative
        try:
            tensor = torch.from_numpy(array if plain else array.astype(array.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise _wrong_dtype(name, str(array.dtype)) from None
        restore = _to_numpy
    elif hasattr(array, "__dlpack__"):
        try:
            tensor = torch.utils.dlpack.from_dlpack(array)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
            raise MorphError(
                f"{name} is a {type(array).__name__} whose values cannot be had by DLPack ({error}). Inside jit, grad or vmap "
                "an array has no values: decompose decides by them, so call it outside."
            ) from error
        restore = _dlpack_restorer(array, name)
    else:
        raise MorphError(
            f"{name} is a {type(array).__name__}; pass a torch.Tensor, a numpy.ndarray or an array with __dlpack__."
        )
    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
        raise _wrong_dtype(name, str(tensor.dtype))
    return tensor, restore


def _wrong_dtype(name: str, dtype: str) -> MorphError:
    return MorphError(f"{name} has dtype {dtype}; convert it to float64, float32, bfloat16 or float16.")


def _to_numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()


def _dlpack_restorer(array: Any, name: str) -> Restore:
    if hasattr(array, "__array_namespace__"):
        namespace = array.__array_namespace__()
    else:
        namespace = importlib.import_module(type(array).__module__.split(".")[0])
    if not hasattr(namespace, "from_dlpack"):
        raise MorphError(f"{name} is a {type(array).__name__}, whose library has no from_dlpack to take the answer back.")
    return lambda tensor: namespace.from_dlpack(tensor.contiguous())
