"""Count what a call asks a GPU for, with no GPU: launches, and how often the host waits for the device.

    python -m bench.launches [--json FILE]

An operator of PyTorch is a launch, unless it only views or allocates; an operator of the kernels is as many as its launcher
makes. The host waits where it reads a value (`item`, `bool`, `tolist`, `cpu`), where a size follows from values (`nonzero`,
boolean masks), and where a factorisation is checked for errors. The second call is counted: the first makes tables that stay.

Closed forms and half-steps are counted on tensors without values, of full size, where whatever is read is zero. Iterations,
and networks as a whole, go by values: they run on small stand-ins on the CPU, whose counts do not depend on the channels.
Tables that the host makes and copies to the device, such as seeds, are seen in the first case alone. Of a network, what is on
the device are its weights and inputs, and what is made of them; tables of channels, which are tensors too, stay on the host.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import fastmorph as fm
from fastmorph.equation import arrays, backends
from fastmorph.morphs import widen_launch

# C_out and C_in of the 13 convolutions of VGG-16 (Simonyan and Zisserman 2015).
VGG16 = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256), *[(512, 512)] * 5]
# What allocates, and a view that PyTorch does not call one.
_FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_CHECKED = {"_linalg_eigh", "_linalg_svd"}  # operators that look for errors themselves
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
_READING = {
    getattr(Tensor, name): name
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "is_nonzero")
}


class Count(NamedTuple):
    """What a call asks for."""

    launches: int
    waits: int


class Counting(TorchDispatchMode):
    """Counts operators by name, in `launches` and `waits`."""

    def __init__(self, device: str, ours: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.device = device
        # Memory of the tensors that count, held so that no other one gets its address; None: all of the device.
        self.memory: dict[int, Any] | None = None if ours is None else {}
        self.note(ours or ())
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.reading = False  # whether a method that reads a value is under way, which is counted by itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if func.namespace == "aten" and func._can_decompose():  # inside an operator of ours: `to`, say, which may copy or not
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if func.namespace == "fastmorph_kernels":
            self._launch(name, args)
            out = self._filled(name, args)
            self.note([out] if isinstance(out, Tensor) else out)
            return out
        if name in _CHECKED:
            self.waits[name] += 1
        if name == "_linalg_check_errors":
            self.waits[name] += 1
            return None
        if name == "_local_scalar_dense":
            if self._ours(tensors) and not self.reading:
                self.waits[name] += 1
            return func(*args, **kwargs) if tensors[0].device.type != "meta" else 0
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_flatten(args[1])[0]
        )
        if masks or name in _SIZED_BY_VALUES:
            self.waits[name] += 1
            if tensors[0].device.type == "meta":  # as if the mask held nowhere
                nothing = tensors[0].new_empty((0, tensors[0].ndim), dtype=torch.int64)
                return {"nonzero": nothing, "index": args[0][:0]}.get(name, args[0])
        if self.device == "meta" and name not in ("_to_copy", "copy_"):  # numbers of the host are arguments of a launch
            args, kwargs = tree_map_only(
                Tensor, lambda x: x if x.ndim or not self._ours(tensors) else x.to("meta"), (args, kwargs)
            )
        out = func(*args, **kwargs)
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        ours = self._ours(tensors + results)
        if ours and not self.reading:
            self.note(results)
        if ours and not (_views(func) or name in _FREE or self.reading):
            self.launches[name] += 1
            copied = name in ("_to_copy", "copy_") and {x.device.type for x in tensors + results} != {self.device}
            if copied and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))):
                self.waits[name] += 1
        return out

    def _ours(self, tensors: list[Tensor]) -> bool:
        """Whether any is on the device that is counted for."""
        there = (x for x in tensors if x.device.type == self.device)
        return any(self.memory is None or x.untyped_storage()._cdata in self.memory for x in there)

    def note(self, tensors: Iterable[Tensor]) -> None:
        """From now on these tensors count."""
        if self.memory is not None:
            self.memory.update(
                (x.untyped_storage()._cdata, x.untyped_storage()) for x in tensors if x.device.type == self.device
            )

    def _launch(self, name: str, args: Any) -> None:
        """What the launcher of a kernel operator asks for, on tensors without values."""
        from fastmorph_kernels.register import OPERATORS

        operator = OPERATORS[name]
        args = tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), args)
        with self:
            operator.launch(operator.allocate(*args), *args)

    def _filled(self, name: str, args: Any) -> Any:
        """What a kernel operator returns, without its kernels, which are not run."""
        from fastmorph_kernels.register import OPERATORS

        out = OPERATORS[name].allocate(*args)
        if self.device != "meta":
            OPERATORS[name].plain(out, *args)
        return out

    @property
    def count(self) -> Count:
        return Count(self.launches.total(), self.waits.total())


class _Reads(TorchFunctionMode):
    """Counts methods that read values; of tensors without any they return zeros."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting, self.device = counting, counting.device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _READING.get(func)
        if name is None or self.counting.reading or not self.counting._ours([args[0]]):
            return func(*args, **(kwargs or {}))
        self.counting.waits[name] += 1
        self.counting.reading = True
        try:
            tensor = args[0]
            if self.device == "meta":
                return func(torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"))
            if name == "cpu":  # a copy, as from another device
                return func(tensor, *args[1:], **(kwargs or {})).clone()
            return func(*args, **(kwargs or {}))
        finally:
            self.counting.reading = False


def _views(func: Any) -> bool:
    """Whether what an operator returns is memory that it was given, unwritten."""
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


@contextmanager
def counting(device: str, ours: Iterable[Tensor] | None = None) -> Iterator[Counting]:
    """Count what runs within, on tensors of `device`: "meta", those without values, or "cpu"; there on `ours`, if given."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    mode = Counting(device, ours)

    def launch(self: Any, grid: Any) -> Callable[..., None]:
        def counted(*_: Any, **__: Any) -> None:
            mode.launches[self.fn.__name__] += 1

        return counted

    with (
        mock.patch.object(InterpretedFunction, "__getitem__", launch, create=True),
        mock.patch.object(JITFunction, "__getitem__", launch),
        mock.patch.object(backends, "why_unavailable", return_value=None),
        mock.patch.object(widen_launch, "why_unavailable", return_value=None),
        mock.patch.object(arrays, "_AT_HAND", frozenset()),  # so that stand-ins on the CPU take a GPU's path
        mode,
        _Reads(mode),
    ):
        yield mode


class Call(NamedTuple):
    """What is counted: `run(backend)`, on a device, of which `ours` are the tensors that count to begin with; None: all."""

    name: str
    device: str
    run: Callable[[str], object]
    ours: Sequence[Tensor] | None = None


def _weight(*shape: int, device: str = "meta") -> Tensor:
    if device == "meta":
        return torch.empty(shape, device="meta")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _decompose(shape: tuple[int, ...], hidden: int, solver: fm.Solver, device: str = "meta") -> Callable[[str], object]:
    weight = _weight(*shape, device=device)

    def run(backend: str) -> object:
        inexact = device == "meta"  # what is read where there are no values says nothing
        return fm.decompose(weight, hidden, solver=solver, backend=backend, generator=0, allow_inexact=inexact)

    return run


def _many(shapes: list[tuple[int, int]]) -> Callable[[str], object]:
    problems = [fm.Problem(_weight(co, ci, 3, 3), co) for co, ci in shapes]
    return lambda backend: fm.decompose_many(problems, backend=backend, generator=0, progress=False, allow_inexact=True)


def vgg16(share: int) -> nn.Sequential:
    """VGG-16 with a `share`-th of its channels, for inputs of 32 x 32 pixels and 10 classes."""
    layers: list[nn.Module] = []
    pooled = {1, 3, 6, 9, 12}
    for number, (co, ci) in enumerate(VGG16):
        layers += [nn.Conv2d(ci if ci == 3 else ci // share, co // share, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (number in pooled)
    head = [nn.Flatten(), nn.Linear(512 // share, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head)


def _network(name: str, grow: Callable[[nn.Module, list[str], fm.Structure, str], object]) -> Call:
    network = vgg16(share=32)
    layers = [name for name, layer in network.named_children() if isinstance(layer, nn.Conv2d | nn.Linear)][:-1]
    structure = fm.follow(network, torch.zeros(1, 3, 32, 32))
    return Call(name, "cpu", lambda backend: grow(network, layers, structure, backend), list(network.parameters()))


def _deepen(network: nn.Module, layers: list[str], structure: fm.Structure, backend: str) -> object:
    return fm.morph(network, [fm.Deepen(name) for name in layers], backend=backend, generator=0, verify=False)


def _widen(network: nn.Module, layers: list[str], structure: fm.Structure, backend: str) -> object:
    channels = {name: 2 * len(network.get_submodule(name).weight) for name in layers}
    return fm.widen(network, channels, backend=backend, generator=0, structure=structure, verify=False)


_NEWTON = fm.General()
CALLS = [
    Call("Direct 2048 -> 4096", "meta", _decompose((2048, 2048, 3, 3), 4096, fm.Direct())),
    Call("Direct 64 -> 128", "meta", _decompose((64, 64, 3, 3), 128, fm.Direct())),
    Call("half-step 64 -> 192", "meta", _decompose((64, 64, 3, 3), 192, fm.General(max_iter=1))),
    Call("half-step 64 -> 228, 2052 unknowns", "meta", _decompose((64, 64, 3, 3), 228, fm.General(max_iter=1))),
    Call("Gauss-Newton, one problem", "cpu", _decompose((1, 8, 8, 5, 5), 16, _NEWTON, "cpu")),
    Call("Gauss-Newton, 6 problems", "cpu", _decompose((6, 8, 8, 5, 5), 16, _NEWTON, "cpu")),
    Call("Gauss-Newton, 64 problems", "cpu", _decompose((64, 8, 8, 5, 5), 16, _NEWTON, "cpu")),
    Call("Anderson, 6 problems", "cpu", _decompose((6, 8, 8, 5, 5), 16, fm.General(acceleration="anderson"), "cpu")),
    Call("Practical, 6 problems", "cpu", _decompose((6, 8, 8, 3, 3), 10, fm.Practical(), "cpu")),
    Call("VGG-16's 13 convolutions", "meta", _many(VGG16)),
    Call("100 alike layers", "meta", _many([(64, 64)] * 100)),
    Call("100 unlike layers", "meta", _many([(64 + n, 64) for n in range(100)])),
    _network("deepen all of VGG-16", _deepen),
    _network("widen all of VGG-16", _widen),
]


def count(call: Call, backend: str) -> Counting:
    """Launches and waits of the second run of a call."""
    with torch.no_grad():
        for _ in range(2):
            with counting(call.device, call.ours) as mode:
                call.run(backend)
    return mode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here too")
    parser.add_argument("--only", metavar="WORDS", default="", help="only calls whose names hold these words")
    parser.add_argument("--operators", action="store_true", help="print which operators are launched and waited for")
    options = parser.parse_args()
    rows = []
    print(f"{'call':40} {'backend':8} {'launches':>8} {'waits':>6}")
    for call in CALLS:
        for backend in ("triton", "torch") if options.only in call.name else ():
            mode = count(call, backend)
            print(f"{call.name:40} {backend:8} {mode.count.launches:8} {mode.count.waits:6}", flush=True)
            rows.append({"call": call.name, "backend": backend, **mode.count._asdict()})
            if options.operators:
                print(f"    launches {dict(mode.launches.most_common())}\n    waits {dict(mode.waits)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
