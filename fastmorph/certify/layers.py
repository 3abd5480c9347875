"""Which layer is the first whose output differs: asked when a certificate fails."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmorph.certify.compare import difference
from fastmorph.certify.inputs import Inputs
from fastmorph.certify.run import LayerOutputs, run


@dataclass(frozen=True)
class _Differing:
    name: str
    parent: str
    child: str
    max_rel: float
    before: int  # layers that agreed until then
    grown: bool


def first_difference(parent: nn.Module, child: nn.Module, mode: str, call: Inputs, dtype: torch.dtype, tolerance: float) -> str:
    """A sentence on the first layer whose output differs by more than `tolerance`, in the order of the parent's run.

    Layers that both models have are compared, call by call, on the parent's channels where the child's output grew. A
    grown output counts only if no output of the parent's own shape agrees after it: its channels may lie in another order.
    Nor does a layer inside of one whose output agrees: its channels may be in another order, and be read so.
    Runs both models once more, and holds the outputs of all their layers meanwhile.
    """
    olds: LayerOutputs = {}
    news: LayerOutputs = {}
    run(parent, "parent", mode, call, dtype, layers=olds)
    run(child, "child", mode, call, dtype, layers=news)
    suspects: list[_Differing] = []
    agreed: set[str] = set()
    for (name, number), (kind, before) in olds.items():
        child_kind, after = news.get((name, number), ("", []))
        if not child_kind or len(before) != len(after):
            continue
        max_rel, same_shape = _worst(before, after)
        if max_rel > tolerance:
            suspects.append(_Differing(name, kind, child_kind, max_rel, len(agreed - {name}), not same_shape))
            continue
        agreed.add(name)
        if same_shape:
            suspects = [one for one in suspects if not (one.grown or one.name.startswith(f"{name}."))]
    return _told(suspects[0] if suspects else None, dtype == torch.float64)


def _worst(before: list[Tensor], after: list[Tensor]) -> tuple[float, bool]:
    """The largest relative difference, and whether all outputs have the parent's shapes."""
    worst, same_shape = 0.0, True
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
