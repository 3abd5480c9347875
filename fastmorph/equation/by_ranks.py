"""`decompose_many` by the ranks of a process group: weights on any of them, answers where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastmorph.equation.decomposition import Decomposition
from fastmorph.equation.divided import Settings, sized, solve_divided
from fastmorph.equation.problem import Checked, Problem
from fastmorph.equation.randomness import Generator, draw_seeds
from fastmorph.errors import MorphError
from fastmorph.ranks import Ranks


def decompose_by_ranks(
    problems: Sequence[Problem[Any]],
    ranks: Ranks,
    settings: Settings,
    generator: Generator | Sequence[int],
    destination: int | None,
) -> list[Decomposition[Any] | None]:
    """The answers, in order; None on other ranks than the destination, if there is one.

    Raises MorphError on all ranks where one fails.
    """
    with ranks.together():
        if destination is not None and destination not in range(ranks.size):
            raise MorphError(f"destination={destination!r} must be None (all ranks) or a rank from 0 to {ranks.size - 1}.")
        holders = _holders(problems, ranks)
        seeds = draw_seeds(generator, len(problems))
        seeds = ranks.from_rank(seeds, 0) if generator is None else ranks.same("the seeds that generator= gives", seeds)
        own = {
            index: replace(sized(settings.check(problem, index)), restore=_as_it_is)
            for index, problem in enumerate(problems)
            if holders[index][0] == ranks.rank
        }
        known: dict[int, Checked] = {}
        for told in ranks.exchange(own):
            known |= told
        checked = [known[index] for index in range(len(problems))]

        def weigh(index: int, rank: int) -> Tensor | None:
            source, weight = rank if rank in holders[index] else holders[index][0], problems[index].weight
            if ranks.rank not in (source, rank):
                return None
            device = ranks.device if weight is None else weight.device
            like = checked[index].weight
            like = like.reshape(*checked[index].batch_shape, *like.shape[1:])
            return ranks.move(weight if ranks.rank == source else None, like, device, source, rank)

        answers: dict[int, Decomposition[Any] | None] = {}
        for index, answer in solve_divided(problems, checked, seeds, settings, weigh, ranks, destination):
            answers[index] = answer if destination in (None, ranks.rank) else None
    return [answers[index] for index in range(len(problems))]


def _holders(problems: Sequence[Problem[Any]], ranks: Ranks) -> list[list[int]]:
    """The ranks that have each problem's weight. Raises MorphError where none has it, and for other lists of problems."""
    for index, problem in enumerate(problems):
        if problem.weight is not None and not isinstance(problem.weight, Tensor):
            kind = type(problem.weight).__name__
            raise MorphError(f"problem {index}: its weight is a {kind}; with process_group= pass tensors, and None elsewhere.")
    told = ranks.exchange([None if p.weight is None else tuple(p.weight.shape) for p in problems])
    if len({len(shapes) for shapes in told}) > 1:
        raise MorphError(f"the ranks have {', '.join(str(len(shapes)) for shapes in told)} problems; give all of them all.")
    holders = [[rank for rank, shapes in enumerate(told) if shapes[index] is not None] for index in range(len(problems))]
    for index, those in enumerate(holders):
        if not those:
            raise MorphError(f"problem {index} has its weight on no rank.")
        if len({told[rank][index] for rank in those}) > 1:
            raise MorphError(f"problem {index} has weights of different shapes on ranks {', '.join(map(str, those))}.")
    return holders


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
