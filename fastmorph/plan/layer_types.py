"""Which classes are layers that can be morphed, and the door by which others add theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastmorph.errors import MorphError

_PLAIN: tuple[tuple[type[nn.Module], ...], ...] = (
    (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    (nn.Module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
# What decides, beside its rule, what a layer computes.
_DECISIVE = ("forward", "_conv_forward", "__call__", "_call_impl", "__getattr__", "__getattribute__", "weight", "bias")


@dataclass(frozen=True, eq=False)
class LayerRule:
    """How layers of a class are read; see `register_layer` for its attributes."""

    cls: type[nn.Module] | str
    spatial_dims: int
    weight: Callable[[Any], Tensor] | None
    pad: Callable[[Any], nn.Module | None] | None
    transposed: bool

    @property
    def plain(self) -> type[nn.Module]:
        """PyTorch's class of layers that compute the same."""
        return _PLAIN[self.transposed][self.spatial_dims]


_RULES: dict[type[nn.Module] | str, LayerRule] = {}


def register_layer(
    cls: type[nn.Module] | str,
    *,
    spatial_dims: int,
    weight: Callable[[Any], Tensor] | None = None,
    pad: Callable[[Any], nn.Module | None] | None = None,
    transposed: bool = False,
) -> None:
    """Teach deepen, grow_kernel and insert_subnet a class of layers with a forward of its own.

    In eval mode, such a layer must compute what PyTorch's plain layer computes, nn.Linear or nn.Conv1d to 3d, with the weight
    that `weight` reads off it, with its own `bias`, and, for a convolution, with its own `stride`, `padding`, `dilation`,
    `groups` and `padding_mode` (PyTorch's defaults where it has none). Before it is morphed, a plain layer of that weight is
    put in its place. What computed the weight (a standardisation, a norm, a mask) is thereby gone: it holds at birth, and
    training does not keep it. Where the weight is the layer's own parameter, the very parameter goes on, and an optimizer's
    moments with it; a computed one starts afresh, in the parameter group of the tensor that it was computed from.

    A subclass that has no forward of its own, or one that does nothing but `return super().forward(input)`, needs no rule, and
    PyTorch's parametrisations and its old `weight_norm` and `spectral_norm` hooks are followed on every class.

    Args:
        cls: the class, or its "module.qualified_name", so that its package need not be imported. Its subclasses are covered as
            long as they override nothing that decides what is computed.
        spatial_dims: 0 for a linear layer, 1 to 3 for a convolution.
        weight: takes the layer, in eval mode, and returns the weight that it computes with, of the shape of a plain layer's:
            (Co, Ci) or (Co, Ci / groups, *K), transposed (Ci, Co / groups, *K). It must give the same bits each time and
            change nothing. None: the layer's own `weight`.
        pad: takes the layer and returns a module that pads its input first (such as `fastmorph.nn.SamePad`), or None for a
            layer that needs none. The layer then becomes an nn.Sequential of submodules pad and layer.
        transposed: whether it is a transposed convolution (for grow_kernel alone).

    Raises:
        MorphError: the class has a rule, or `cls`, `spatial_dims` or `transposed` is none.
    """
    if not isinstance(cls, str) and not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise MorphError(f"register_layer takes a class of nn.Module or its qualified name as a string, not {cls!r}.")
    if spatial_dims not in (0, 1, 2, 3) or (transposed and not spatial_dims):
        raise MorphError(
            f"register_layer: spatial_dims={spatial_dims!r} must be 0 for a linear layer, or 1, 2 or 3 for a convolution; a "
            "transposed one has at least 1."
        )
    if cls in _RULES or (isinstance(cls, type) and _qualified_name(cls) in _RULES):
        raise MorphError(f"{cls!r} has a rule already; a subclass of your own may have another.")
    _RULES[cls] = LayerRule(cls, spatial_dims, weight, pad, transposed)


def find_rule(module: nn.Module) -> tuple[LayerRule | None, str | None]:
    """The rule of the nearest of a module's classes that has one, and what overrides the computation below that class.

    The second is a whole predicate, "has a forward of its own"; None where the rule says all.
    """
    below: list[type] = []
    for cls in type(module).__mro__:
        rule = _RULES.get(cls) or _RULES.get(_qualified_name(cls))
        if rule is not None:
            return rule, _override(module, below)
        below.append(cls)
    return None, None


def _override(module: nn.Module, below: list[type]) -> str | None:
    if parametrize.is_parametrized(module):
        below = below[1:]  # the class that PyTorch made for it
    for cls in below:
        for name in _DECISIVE:
            if name in vars(cls) and not (name == "forward" and _only_calls_super(cls)):
                return f"{cls.__name__} has a {name.strip('_')} of its own"
    if "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    return None


class _Template(nn.Module):
    def forward(self, input: Any) -> Any:
        return super().forward(input)


def _only_calls_super(cls: type) -> bool:
    """Whether a class's forward is `return super().forward(input)`, to the instruction; what is not certain is not."""
    function, template = vars(cls)["forward"], _Template.forward.__code__
    if not isinstance(function, FunctionType) or "super" in function.__globals__ or function.__closure__ is None:
        return False
    code = function.__code__
    return (
        code.co_code == template.co_code
        and code.co_names == template.co_names
        and (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_nlocals) == (2, 0, 0, 2)
        and [cell.cell_contents for cell in function.__closure__] == [cls]
    )


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
