"""Which layer is the first whose output differs: asked when a certificate fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmorph.certify.compare import difference
from fastmorph.certify.readings import Reading, read_layer
from fastmorph.certify.run import run
from fastmorph.inputs import Inputs


class _Suspect(NamedTuple):
    """A layer that differs: whether its output grew, and the sentence that names it."""

    name: str
    grown: bool
    finding: str


def first_difference(
    parent: nn.Module,
    child: nn.Module,
    mode: str,
    call: Inputs,
    dtype: torch.dtype,
    tolerance: float,
    readings: Sequence[Reading] = (),
) -> str:
    """A sentence on the first layer whose output differs by more than `tolerance`, in the order of the parent's run.

    Layers that both models have are compared, call by call, on the parent's channels where the child's output grew. A
    grown output counts only if no output of the parent's own shape agrees after it: its channels may lie in another order.
    Nor does a layer inside of one whose output agrees: its channels may be in another order, and be read so.
    Runs both models once more, and holds the outputs of all their layers meanwhile.
    """
    olds, news = (run(m, who, mode, call, dtype, keep_layers=True).layers for who, m in (("parent", parent), ("child", child)))
    news = {(read_layer(readings, name) or "", number): run for (name, number), run in news.items()}
    exact = dtype == torch.float64
    remedy = "leave it out of the plan, or solve it in float64" if exact else "run it in a finer dtype, or pass a tolerance"
    suspects: list[_Suspect] = []
    agreed: set[str] = set()
    for (name, number), (kind, before) in olds.items():
        child_kind, after = news.get((name, number), ("", []))
        if not child_kind or len(before) != len(after):
            continue
        max_rel, same_shape = _worst(before, after)
        if max_rel > tolerance:
            kinds = kind if kind == child_kind else f"{kind} in the parent, {child_kind} in the child"
            amount = f"by {max_rel:.1e} of its largest value" if max_rel < float("inf") else "beyond measure"
            finding = (
                f"The first layer whose output differs is {name!r} ({kinds}): {amount}, after {len(agreed - {name})} layers"
                f" that agree. Remedy: {remedy}."
            )
            suspects.append(_Suspect(name, not same_shape, finding))
            continue
        agreed.add(name)
        if same_shape:
            suspects = [one for one in suspects if not (one.grown or one.name.startswith(f"{name}."))]
    if suspects:
        return suspects[0].finding
    return (
        "No layer that both models have differs so: look at what runs outside of layers, such as a forward that reads"
        " a layer's weights or sizes."
    )


def _worst(before: list[Tensor], after: list[Tensor]) -> tuple[float, bool]:
    """The largest relative difference, and whether all outputs have the parent's shapes."""
    worst, same_shape = 0.0, True
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape and old.ndim == new.ndim:
            same_shape = False
            new = new[tuple(slice(size) for size in old.shape)]
        worst = max(worst, difference(old, new)[1])
    return worst, same_shape
