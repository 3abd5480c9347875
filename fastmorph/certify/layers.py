"""Which layer is the first whose output differs: asked when a certificate fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.certify.compare import difference
from fastmorph.certify.inputs import Inputs
from fastmorph.certify.run import run


@dataclass(frozen=True)
class _Differing:
    name: str
    parent: str
    child: str
    max_rel: float
    before: int  # layers that agreed until then


def first_difference(parent: nn.Module, child: nn.Module, mode: str, call: Inputs, *, exact: bool, tolerance: float) -> str:
    """A sentence on the first layer, by name and in the parent's order, whose output differs by more than `tolerance`.

    Layers that both models have are compared, all calls of each, on the parent's channels where the child's output grew. A
    grown output counts only if no output of the parent's own shape agrees after it: its channels may lie in another order.
    Runs both models once more, and holds every output of a layer of the parent meanwhile.
    """
    outputs: dict[str, list[tuple[nn.Module, list[Tensor]]]] = {}
    calls: dict[str, list[tuple[nn.Module, list[Tensor]]]] = {}

    def keep(where: dict[str, list[tuple[nn.Module, list[Tensor]]]], name: str, module: nn.Module, output: Any) -> None:
        tensors = [leaf.detach().clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        where.setdefault(name, []).append((module, tensors))

    run(parent, "parent", mode, call, exact=exact, watch=lambda *found: keep(outputs, *found))
    run(child, "child", mode, call, exact=exact, watch=lambda *found: keep(calls, *found))
    grown: _Differing | None = None
    agreed = 0
    for name, olds in outputs.items():
        news = calls.get(name, [])
        if not name or len(olds) != len(news):
            continue
        max_rel, same_shape = _worst(olds, news)
        if max_rel <= tolerance:
            agreed += 1
            grown = None if same_shape else grown
            continue
        found = _Differing(name, type(olds[0][0]).__name__, type(news[0][0]).__name__, max_rel, agreed)
        if same_shape:
            return _told(grown or found, exact)
        grown = grown or found
    return _told(grown, exact)


def _worst(olds: list[tuple[nn.Module, list[Tensor]]], news: list[tuple[nn.Module, list[Tensor]]]) -> tuple[float, bool]:
    """The largest relative difference over all calls of a layer, and whether all outputs have the parent's shapes."""
    worst, same_shape = 0.0, True
    for (_, before), (_, after) in zip(olds, news, strict=True):
        if len(before) != len(after):
            return float("inf"), True
        for old, new in zip(before, after, strict=True):
            if old.shape != new.shape and old.ndim == new.ndim:
                same_shape = False
                new = new[tuple(slice(size) for size in old.shape)]
            worst = max(worst, difference(old, new)[1])
    return worst, same_shape


def _told(found: _Differing | None, exact: bool) -> str:
    if found is None:
        return (
            "No layer that both models have differs so: look at what runs outside of layers, such as a forward that reads"
            " a layer's weights or sizes."
        )
    kinds = found.parent if found.parent == found.child else f"{found.parent} in the parent, {found.child} in the child"
    amount = f"by {found.max_rel:.1e} of its largest value" if found.max_rel < float("inf") else "beyond measure"
    remedy = "leave it out of the plan, or solve it in float64" if exact else "run it in a finer dtype, or pass a tolerance"
    return (
        f"The first layer whose output differs is {found.name!r} ({kinds}): {amount}, after {found.before} layers that agree."
        f" Remedy: {remedy}."
    )
