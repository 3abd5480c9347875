"""Which problems are solved together."""

from __future__ import annotations

from collections.abc import Sequence

from fastmorph.equation.problem import Checked
from fastmorph.equation.unlike import shares_launches

_BYTES = 8  # of a working-precision number


def chunks_of(problems: Sequence[Checked], memory_budget: int, *, unlike: bool = False) -> list[list[int]]:
    """Indices of problems that are solved together, in the order of each chunk's first.

    unlike: whether those that share launches are, too.
    """
    buckets: dict[object, list[int]] = {}
    for index, p in enumerate(problems):
        co, ci = p.weight.shape[1:3]
        lone = None if p.choice.factors is None else index  # factors are one problem's own
        key: tuple[object, ...] = (p.weight.dtype, p.weight.device, p.backend, p.choice.solver)
        if not (unlike and shares_launches(p)):
            key += (co, ci, p.hidden, p.frame, p.choice.role, lone)
        buckets.setdefault(key, []).append(index)
    chunks: list[list[int]] = []
    for bucket in buckets.values():
        room = 0.0
        for index in bucket:
            p = problems[index]
            co, ci = p.weight.shape[1:3]
            need = _BYTES * p.choice.solver.memory(co, ci, p.hidden, p.frame) * len(p.weight)
            if need > room:
                chunks.append([])
                room = float(memory_budget)
            chunks[-1].append(index)
            room -= need
    return chunks
