"""P-activations: any activation, made the identity at birth by a parameter.

Source: Wei, Wang, Rui, Chen, "Network Morphism", ICML 2016 (arXiv 1603.01670), the section on P-activation.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from fastmorph.errors import MorphError

# The activations that torch.nn.functional names and that need no argument. rrelu is not here: its function and its
# module disagree on whether it is random by default.
_MODULES: dict[str, type[nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
}
# Every function of PyTorch that computes one of them. An in-place one stands for its plain twin.
_NAMES: dict[Any, str] = {
    getattr(namespace, name + suffix): name
    for namespace in (F, torch, torch.Tensor)
    for name in _MODULES
    for suffix in ("", "_")
    if hasattr(namespace, name + suffix)
}
_NOT_ELEMENTWISE = ("glu", "gumbel_softmax", "log_softmax", "normalize", "softmax", "softmin")


@torch.fx.wrap  # a leaf for torch.fx.symbolic_trace, which cannot follow the loop over dimensions
def _mix(a: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(1 - a) * y + a * x, with a (C,) along dim 1 of x (N, C, *) or (1,) for all of x; in x's dtype."""
    c = a.numel()
    if c > 1 and (x.ndim < 2 or x.shape[1] != c):
        raise RuntimeError(f"a P-activation of {c} channels needs them in dim 1 of its input, whose shape is {x.shape}")
    a = a.view([c if dim == 1 else 1 for dim in range(x.ndim)])
    return ((1 - a) * y + a * x).to(x.dtype)


class PActivation(nn.Module):
    """(1 - a) * fn(x) + a * x with a learnable a: the identity at a = 1, fn at a = 0.

    Args:
        fn: a name ("gelu", "tanh", ...: PyTorch's elementwise activations), a function, or a module, which becomes a
            submodule (a copy of it, if it works in place). "relu", in any spelling, gives a `PReLU`.
        a: what `a` starts from.
        channels: None for one `a`, of shape (1,); else one a channel, (channels,), along dim 1 as in `torch.nn.PReLU`:
            inputs are (N, channels, *). For features in the last of three or more dimensions leave it None.

    Any shape and any floating dtype in, the same out. At a = 1 every finite x comes back bit for bit (a zero may lose
    its sign) wherever fn(x) is finite. Where fn overflows, 0 * inf makes a NaN: masking that would cost every forward
    pass, so choose an fn that is finite wherever x is (the named ones are, up to a sixth of the dtype's maximum).

    Raises:
        MorphError: fn is unknown, not elementwise, in place, or not finite. A function, or a module without parameters
            and buffers, is tried on a small CPU tensor; a module of your own that holds any is taken at its word.
        RuntimeError: dim 1 of an input does not have `channels` entries.

    Source: Wei et al. 2016, P-activation; any continuous fn will do, idempotent or not.
    """

    a: nn.Parameter
    fn: nn.Module

    def __new__(cls, fn: Any = None, a: float = 1.0, channels: int | None = None) -> PActivation:
        """Make a `PReLU` where fn is ReLU; copy and pickle call this without arguments."""
        return super().__new__(PReLU if cls is PActivation and _name(fn) == "relu" else cls)

    def __init__(self, fn: str | nn.Module | Callable[[Tensor], Tensor], a: float = 1.0, channels: int | None = None) -> None:
        super().__init__()
        self.fn = _plain(fn)
        self.a = nn.Parameter(torch.full((_count(channels),), float(a)))

    def forward(self, input: Tensor) -> Tensor:
        """Map an input of any shape, (N, channels, *) if there are channels, to an output of the same shape."""
        return _mix(self.a, self.fn(input), input)

    def extra_repr(self) -> str:
        """Say how many `a` there are."""
        return f"channels={self.a.numel()}"


class PReLU(PActivation, nn.PReLU):
    """The P-activation of ReLU: `torch.nn.PReLU` with its `weight` as `a`, and the same state dict.

    The type tells it from a PReLU that the network had before, which is never penalised, scheduled or folded.
    """

    def __init__(self, fn: Any = "relu", a: float = 1.0, channels: int | None = None) -> None:
        if _name(fn) != "relu":
            raise MorphError(f"PReLU is the P-activation of ReLU, not of {fn!r}; use PActivation for that.")
        nn.PReLU.__init__(self, num_parameters=_count(channels), init=float(a))

    @property
    def a(self) -> nn.Parameter:  # type: ignore[override]
        """The slope of the negative side."""
        return self.weight

    @property
    def fn(self) -> nn.Module:  # type: ignore[override]
        """What remains at a = 0."""
        return nn.ReLU()

    forward = nn.PReLU.forward
    extra_repr = nn.PReLU.extra_repr


class _Function(nn.Module):
    """A function as a module; it pickles when the function does."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, input: Tensor) -> Tensor:
        return self.fn(input)

    def extra_repr(self) -> str:
        return getattr(self.fn, "__name__", repr(self.fn))


def _count(channels: int | None) -> int:
    if channels is not None and channels < 1:
        raise MorphError(f"a P-activation needs at least one channel, not {channels}; None means one a for all of them.")
    return channels or 1


def _name(fn: object) -> str | None:
    """The name of an activation given by name, of a function of PyTorch's, and of nn.ReLU; None for all else."""
    if isinstance(fn, str):
        return fn
    if type(fn) is nn.ReLU:
        return "relu"
    return _NAMES.get(fn) if isinstance(fn, Hashable) else None


def _plain(fn: object) -> nn.Module:
    """The activation as a module that leaves its input alone."""
    name = _name(fn)
    if name in _MODULES:
        return _MODULES[name]()
    known = f"Pass one of {', '.join(_MODULES)}, or an elementwise module or function, finite for every finite x."
    if name in _NOT_ELEMENTWISE:
        raise MorphError(f"{name!r} cannot be a P-activation: it is not elementwise. {known}")
    if name is not None:
        close = difflib.get_close_matches(name.lower(), _MODULES)
        hint = f"; did you mean {' or '.join(map(repr, close))}" if close else ""
        raise MorphError(f"there is no activation named {name!r}{hint}. {known}")
    if not callable(fn):
        raise MorphError(f"{fn!r} cannot be a P-activation: it is not a name, a module or a function. {known}")

    module = fn if isinstance(fn, nn.Module) else _Function(fn)
    if any(getattr(part, "inplace", False) is True for part in module.modules()):
        module = copy.deepcopy(module)
        for part in module.modules():
            if getattr(part, "inplace", False) is True:
                part.inplace = False  # type: ignore[assignment]
    fault = _fault(module)
    if fault is not None:
        raise MorphError(f"{fn!r} cannot be a P-activation: {fault}. {known}")
    return module


def _fault(module: nn.Module) -> str | None:
    """Why the module is no finite, elementwise function; None where it is one, or where it cannot be tried."""
    stateful = [m for m in module.modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]]
    for part in stateful:
        # Of the layers of PyTorch that hold weights or statistics, PReLU alone is elementwise.
        if type(part).__module__.startswith("torch.nn.modules.") and not isinstance(part, nn.PReLU):
            return f"{type(part).__name__} is not elementwise"
    if stateful:  # what shape it takes is not ours to guess
        return None

    module = copy.deepcopy(module).eval()
    x = torch.linspace(-3.0, 3.0, 24, dtype=torch.float64, device="cpu").view(2, 4, 3)
    moved = x.clone()
    moved[0, 0, 0] = 1.5
    given = x.clone()
    try:
        with torch.no_grad():
            y, y_moved = module(given), module(moved)
    except Exception as error:
        return f"it failed on a tensor of shape (2, 4, 3) with {type(error).__name__}: {error}"
    if not torch.equal(given, x):
        return "it changes its input in place"
    if not isinstance(y, Tensor):
        return f"it returns a {type(y).__name__}, not a tensor"
    if y.shape != x.shape:
        return f"it is not elementwise, it turns shape {tuple(x.shape)} into {tuple(y.shape)}"
    if not y.isfinite().all():
        return f"it is not finite at x = {x[~y.isfinite()][0].item():.3g}, so that a = 1 would give NaN there"
    if not torch.equal(y.flatten()[1:], y_moved.flatten()[1:]):
        return "it is not elementwise, one element of its input changes others of its output"
    return None
