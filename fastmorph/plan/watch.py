"""Operators that change one layer each and keep what it computes: whether the code around it lets them, and what they left.

The model is followed on one call before such a stretch of a plan, and once more after it, on shapes alone. Before: a weight
that something takes outside of its layer's own call cannot change. After: the code around the layers must do what it did,
operator by operator. A layer that no comparison of the whole model reaches is compared by itself, on a random map of its own,
borders included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.compare import TOLERANCES, Comparison, coarsest_dtype, compare
from fastmorph.certify.outputs import eval_mode
from fastmorph.certify.run import isolated, run
from fastmorph.errors import MorphError
from fastmorph.graph.find import backbone_hint, tensor_of
from fastmorph.graph.skeleton import ForwardError
from fastmorph.graph.trail import Operation, Trail, Walked, bare_skeleton, walk, walk_in_training
from fastmorph.inputs import Inputs
from fastmorph.outputs import Outputs
from fastmorph.plan.layers import Layer, refusal, unhooked
from fastmorph.plan.reads import reader


class Surroundings:
    """The code around the layers of a model, as it was before they were changed."""

    def __init__(self, model: nn.Module, call: Inputs | None, walked: Walked | None = None) -> None:
        """`walked` is what the model did on the call, where that is known."""
        self._layers = dict[str, None]()
        self._walked = _follow(model, call, walked)
        self.untouched: tuple[str, ...] = ()  # parameters that eval mode does not use
        self._uses: Any = WeakTensorKeyDictionary()  # by parameter: the modules that ran when it was taken, each time
        self._touched: Any = WeakTensorKeyDictionary()  # those that eval mode takes
        if self._walked is None:
            return
        trail = self._walked.trail
        self.untouched = tuple(name for name, _ in model.named_parameters() if name not in trail.touched)
        modules = dict(model.named_modules())
        for name, stacks in trail.uses.items():
            tensor = tensor_of(model, name)
            self._uses[tensor] = [[modules[part] for part in stack] for stack in stacks]
            if name in trail.touched:
                self._touched[tensor] = True

    def check(self, model: nn.Module, layer: Layer) -> bool:
        """Raise MorphError where something takes the layer's weight outside of its own call.

        Returns False for a layer that is part of what was checked before.
        """
        name = next(name for name, module in model.named_modules() if module is layer.module)
        if any(not known or f"{name}.".startswith(f"{known}.") for known in self._layers):
            return False
        self._layers[name] = None
        where = reader(model) if self._walked is None else None
        if where is not None:
            raise refusal(
                layer.name,
                f"the forward of {f'module {where!r}' if where else 'the model itself'} takes weights besides calling layers, "
                "and the model could not be followed to see which",
                f"pass example_inputs= that it runs on, or let the forward call its layers alone.{backbone_hint(model)}".rstrip(
                    "."
                ),
            )
        for parameter in layer.origins:
            for stack in self._uses.get(parameter, ()):
                if layer.module not in stack:
                    name = next(name for name, module in model.named_modules() if module is stack[-1])
                    raise refusal(
                        layer.name,
                        f"{f'module {name!r}' if name else 'the model itself'} ({type(stack[-1]).__name__}) reads its weight "
                        "besides calling it",
                        "let the forward call the layer alone (a penalty on weights belongs to the training loop), or morph "
                        "another layer",
                    )
        return True

    def touches(self, layer: Layer) -> bool:
        """Whether the run in eval mode took the layer's weight; False where that is not known."""
        return any(parameter in self._touched for parameter in layer.origins)

    def compare(self, model: nn.Module) -> None:
        """Raise MorphError where the code around the changed layers does not do what it did."""
        if self._walked is None or not self._layers:
            return
        call, trail = self._walked.call, self._walked.trail
        layers = set(self._layers)
        some = f"layer{'s' * (len(layers) > 1)} {', '.join(map(repr, self._layers))}"
        remedy = "let the forward call its layers alone, or morph another layer"
        try:
            with isolated({"cpu"}):
                after = walk(bare_skeleton(model), call).trail
        except (ForwardError, MorphError) as error:
            raise MorphError(
                f"{some} cannot be morphed: the model's forward does not run on the child ({error}), because it reads sizes or "
                f"attributes of its layers; {remedy}."
            ) from error
        found = _difference(trail, after, layers)
        if found is None:
            return
        with isolated({"cpu"}):
            if _difference(trail, walk(self._walked.skeleton, call).trail, layers) is not None:
                return  # no two runs of the parent are alike
        raise MorphError(
            f"{some} cannot be morphed: in the child {found}, because the forward reads sizes or attributes of its "
            f"layers; {remedy}."
        )


def _follow(model: nn.Module, call: Inputs | None, walked: Walked | None) -> Walked | None:
    if call is None:
        return None
    try:
        with isolated({"cpu"}):
            walked = walked or walk(bare_skeleton(model), call)
            walk_in_training(walked)
    except Exception:  # TorchScript, a branch on values, ...: what cannot be followed is judged by its outputs alone
        return None
    return walked


def _difference(before: Trail, after: Trail, layers: set[str]) -> str | None:
    """The first thing that the code around the layers does in another way, as a clause."""
    olds, news = before.around(layers), after.around(layers)
    for old, new in zip(olds, news, strict=False):
        if old != new:
            return f"{_told(new, 'runs')} where {_told(old, 'ran')}"
    if len(olds) != len(news):
        return f"the code around them runs {len(news)} operators where it ran {len(olds)}"
    if before.result != after.result:
        return f"the model's outputs have shapes {after.result} where they had {before.result}"
    return None


def _told(operation: Operation, runs: str) -> str:
    module = f"module {operation.stack[-1]!r}" if operation.stack[-1] else "the model itself"
    numbers, shapes = ", ".join(map(str, operation.numbers)), ", ".join(map(str, operation.shapes))
    return f"{module} {runs} {operation.name}({numbers}) for a result of shape {shapes}"


class Piece:
    """A layer's outputs on a random input of its own, before it is changed."""

    def __init__(self, layer: Layer, plain: Layer, *, exact: bool) -> None:
        """`plain` is the layer, or a plain one of its sizes; it is run in float64 if `exact`, else in its own dtype."""
        self.name, weight = layer.name, plain.origin
        self._dtype, device = weight.dtype, weight.device
        with eval_mode(plain.module):  # where a weight that is computed moves nothing
            sizes = _map_sizes(plain)
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(1, plain.channels[1], *sizes, generator=generator, dtype=torch.float64, device="cpu")
        self._precision = torch.float64 if exact and device.type != "mps" else self._dtype
        self._call = Inputs((values.to(device, self._dtype),), {})
        self._before = self._run(layer.module)

    def _run(self, module: nn.Module) -> Outputs:
        return run(unhooked(module), f"layer {self.name!r}", "eval", self._call, self._precision).outputs

    def compare(self, model: nn.Module) -> list[Comparison]:
        """What stands in the layer's place against the layer."""
        after = self._run(model.get_submodule(self.name))
        tolerance = TOLERANCES[self._dtype][self._precision == torch.float64]
        rows = compare(self._before, after, "eval", self._precision, tolerance)
        return [replace(row, output=f"layer {self.name!r}") for row in rows]


def _map_sizes(layer: Layer) -> list[int]:
    """A small map, on which every padding mode works and each border is met by itself."""
    if not layer.dims:
        return []
    module, pads = layer.module, layer.padding()
    sizes = zip(layer.kernel, module.dilation, module.stride, pads, strict=True)
    return [d * (k - 1) + 1 + max(s, *pad) for k, d, s, pad in sizes]


def with_layers(certificate: Certificate | None, rows: Sequence[Comparison], child: nn.Module) -> Certificate | None:
    """A certificate, if there is one, with the rows of layers that were compared by themselves."""
    if not rows:
        return certificate
    where = next((f"The first that differs by itself is {row.output}." for row in rows if not row.holds), "")
    on = "each new part and the layer that it replaces, on a random input of its own"
    if certificate is None:
        dtype = coarsest_dtype([child], [])
        return Certificate(tuple(rows), dtype, ("eval",), TOLERANCES[dtype][1], where, on)
    on = f"{certificate.on or 'the inputs given'}, and where they do not reach a layer, {on}"
    return replace(certificate, rows=(*certificate.rows, *rows), where=certificate.where or where, on=on)
