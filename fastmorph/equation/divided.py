"""Equations divided among ranks, or solved one chunk after the other for weights that are elsewhere.

Problems are bucketed as in `decompose_many`, and each bucket is solved by one rank, whole: so every answer has the bits of a
single process's. Chunks are dealt largest first, each to the rank with the least to do so far (Graham 1969, LPT: at most 4/3 of
the shortest time). The ranks solve in waves, a chunk each; of a wave's answers all ranks learn one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmorph.elsewhere import on_meta
from fastmorph.equation.arithmetic import exact_arithmetic
from fastmorph.equation.chunks import chunks_of
from fastmorph.equation.decomposition import Decomposition, InexactMorphError
from fastmorph.equation.problem import Checked, Problem, check
from fastmorph.equation.solve import Outcome, accepted, look_at, solve_alike
from fastmorph.errors import MorphError
from fastmorph.ranks import Ranks

Weigh = Callable[[int, int], Tensor | None]


@dataclass(frozen=True)
class Settings:
    """The settings of `decompose_many` that a problem is checked with, and the budget of a batched solve."""

    solver: Any
    backend: str | None
    precision: str | None
    allow_inexact: bool
    memory_budget: int

    @torch.no_grad()
    @exact_arithmetic()
    def check(self, problem: Problem[Any], index: int) -> Checked:
        """The problem, checked. Raises MorphError that names it."""
        try:
            return check(
                problem,
                solver=self.solver,
                backend=self.backend,
                precision=self.precision,
                allow_inexact=self.allow_inexact,
            )
        except MorphError as error:
            raise error.of_problem(index) from None


def sized(checked: Checked) -> Checked:
    """What is to be known of a problem to bucket it: no weight, and of factors only that there are some."""
    factors = None if checked.choice.factors is None else (torch.empty(0), torch.empty(0))
    return replace(checked, weight=on_meta(checked.weight), choice=checked.choice._replace(factors=factors))


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """Which numbers each of `count` ranks gets: largest cost first, to the rank whose costs are least, the first of equals."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = min(range(count), key=lambda rank: loads[rank])
        dealt[rank].append(number)
        loads[rank] += costs[number]
    return dealt


def solve_divided(
    problems: Sequence[Problem[Any]],
    checked: Sequence[Checked],
    seeds: Sequence[int],
    settings: Settings,
    weigh: Weigh,
    ranks: Ranks | None,
    destination: int | None = None,
) -> Iterator[tuple[int, Decomposition[Tensor]]]:
    """Solve problems, and yield each one's number and answer on all ranks, in the same order, chunk by chunk.

    Args:
        problems: what to solve; their weights are not looked at.
        checked: the same, as `sized` has them.
        seeds: of each problem's noise.
        settings: those of `decompose_many`.
        weigh: takes a problem's number and a rank, and returns the weight there; all ranks call it. None on the other ranks.
        ranks: who works; None: this process alone.
        destination: the rank that gets the answers, whose kernels are None on the others; None: all get them.

    Raises:
        MorphError: as `decompose_many` does, on all ranks.
    """
    me, count = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    chunks = chunks_of(checked, settings.memory_budget)
    dealt = deal([sum(_cost(checked[index]) for index in chunk) for chunk in chunks], count)
    for wave in range(max(map(len, dealt))):
        now = [chunks[mine[wave]] if wave < len(mine) else [] for mine in dealt]
        mine: dict[int, Problem[Any]] = {}
        for rank, chunk in enumerate(now):
            for index in chunk:
                weight = weigh(index, rank)
                if rank == me:
                    mine[index] = replace(problems[index], weight=weight)
                del weight
        outcomes = _solved(mine, seeds, settings)
        for rank, chunk in enumerate(now):
            for index in chunk:
                outcome = outcomes.pop(index, None)
                if ranks is not None:
                    outcome = _told(outcome, problems[index], checked[index], rank, ranks, destination)
                assert outcome is not None
                try:
                    yield index, accepted(outcome, allow_inexact=settings.allow_inexact)
                except MorphError as error:
                    raise error.of_problem(index) from None


def _cost(checked: Checked) -> float:
    """Operations that a problem takes: as the solver counts them, one half-step each, or products of its sizes."""
    (batch, co, ci), hidden = checked.weight.shape[:3], checked.hidden
    counted = checked.choice.solver.cost(co, ci, hidden, checked.frame, 1)
    return batch * (counted or 2.0 * hidden * checked.weight[0].numel())


@torch.no_grad()
@exact_arithmetic()
def _solved(mine: dict[int, Problem[Any]], seeds: Sequence[int], settings: Settings) -> dict[int, Outcome]:
    """The outcomes of a chunk, whose weights are let go."""
    if not mine:
        return {}
    checked = {index: settings.check(problem, index) for index, problem in mine.items()}
    mine.clear()
    (outcomes,) = look_at([solve_alike([*checked.values()], [seeds[index] for index in checked])])
    return dict(zip(checked, outcomes, strict=True))


def _told(
    outcome: Outcome | None,
    problem: Problem[Any],
    checked: Checked,
    source: int,
    ranks: Ranks,
    destination: int | None,
) -> Outcome:
    """An outcome of one rank, on all; raises there what left no answer."""
    answer, error = (None, None) if outcome is None else outcome
    facts: dict[str, Any] = {} if answer is None else vars(answer)
    facts = {key: _moved(value, "cpu") for key, value in facts.items() if key not in ("first", "second")}
    text = None if error is None else str(error)
    facts, text, lost = ranks.from_rank((facts, text, outcome is not None and answer is None), source)
    if lost:
        raise MorphError(text)
    device = ranks.device if problem.weight is None else problem.weight.device
    shape, (co, ci) = checked.batch_shape, checked.weight.shape[1:3]
    sizes = (
        (*shape, checked.hidden, ci, *checked.frame.first),
        (*shape, co, checked.hidden, *checked.frame.second),
    )
    kernels = (None, None) if answer is None else (answer.first, answer.second)
    first, second = (
        ranks.move(kernel, torch.empty(size, dtype=checked.dtype, device="meta"), device, source, destination)
        for kernel, size in zip(kernels, sizes, strict=True)
    )
    found: Decomposition[Any] = Decomposition(first, second, **{key: _moved(value, device) for key, value in facts.items()})
    return found, None if text is None else InexactMorphError(text, found)


def _moved(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
