"""Closed forms of unlike sizes that share launches, on a backend that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastmorph.equation.backends.protocol import ClosedForm, ClosedForms
from fastmorph.equation.bounds import tolerance
from fastmorph.equation.problem import Checked
from fastmorph.equation.randomness import Noise
from fastmorph.equation.solvers import Direct
from fastmorph.equation.solvers.base import is_corrected


class SolvedUnlike(NamedTuple):
    """Closed forms, each of sizes of its own; the host has not looked at them, and has not waited for them."""

    problems: Sequence[Checked]
    seeds: Sequence[int]
    answers: ClosedForms


def shares_launches(problem: Checked) -> bool:
    """Whether a problem is solved with unlike ones: a closed form of full rank, which takes no half-step to correct it."""
    choice, (co, ci) = problem.choice, problem.weight.shape[1:3]
    full_rank = type(choice.solver) is Direct and choice.factors is None  # a class that is derived from it has its own way
    sizes = (problem.frame, co, ci, problem.hidden)
    return problem.backend.takes_unlike and full_rank and not is_corrected(problem.weight.dtype, *sizes)


def solve_unlike(problems: Sequence[Checked], seeds: Sequence[int]) -> SolvedUnlike:
    """Solve closed forms of one dtype, device, backend and solver."""
    first = problems[0]
    solver = first.choice.solver
    assert isinstance(solver, Direct)
    dtype, equations = first.weight.dtype, []
    for problem, seed in zip(problems, seeds, strict=True):
        weight = problem.weight.contiguous()  # in one layout, by which products round
        keys = Noise([seed], [len(weight)], weight.device, dtype).keys(2)
        equations.append(ClosedForm(weight, problem.hidden, problem.frame, keys, problem.choice.role == "first"))
    found = first.backend.direct_many(equations, density=solver.density, limit=tolerance(dtype))
    return SolvedUnlike(problems, seeds, found)
