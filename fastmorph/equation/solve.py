"""From checked problems of one shape to decompositions: stack, solve, equalise, round, measure, split.

Where work is queued on a device, nothing is read before all is queued: `solve_alike` waits for nothing that a solver does not
wait for, and `look_at` reads all that decides, of any number of batches, at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.arrays import times_power_of_two
from fastmorph.equation.backends.protocol import ClosedForms
from fastmorph.equation.bounds import tolerance
from fastmorph.equation.decomposition import Decomposition, InexactMorphError
from fastmorph.equation.estimate import MEASURED, residual_of
from fastmorph.equation.gauge import balance, equalise
from fastmorph.equation.half_step import HalfStep
from fastmorph.equation.problem import Checked, are_in_range
from fastmorph.equation.randomness import Noise
from fastmorph.equation.solvers.base import Equation, Solution, Solver
from fastmorph.equation.unlike import SolvedUnlike, shares_launches, solve_unlike
from fastmorph.errors import MorphError


class Solved(NamedTuple):
    """Problems that were solved as one batch; the host has not looked at the answer, and has not waited for it."""

    problems: Sequence[Checked]
    seeds: Sequence[int]
    equation: Equation
    answer: _Answer


Outcome = tuple[Decomposition[Any] | None, MorphError | None]


def solve_alike(problems: Sequence[Checked], seeds: Sequence[int]) -> Solved | SolvedUnlike:
    """Solve problems of one dtype, device, backend and solver together: those that share launches, or of the same sizes."""
    first, choice = problems[0], problems[0].choice
    if shares_launches(first):
        return solve_unlike(problems, seeds)
    # In one layout, by which products round: a weight gives the same bits wherever it stands.
    weight = (torch.cat([p.weight for p in problems]) if len(problems) > 1 else first.weight).contiguous()
    work = first.backend.working_dtype(weight.device)
    noise = Noise(seeds, [len(p.weight) for p in problems], weight.device, work)
    given = weight if choice.solver.closed_form else weight.to(work)
    equation = Equation(given, first.hidden, first.frame, weight.dtype, noise, first.backend, choice.role, choice.factors)
    return Solved(problems, seeds, equation, _attempt(equation, choice.solver))


def look_at(batches: Sequence[Solved | SolvedUnlike]) -> list[list[Outcome]]:
    """Of each batch, in order, each answer with the error to raise if it is not exact and has to be, or could not be had.

    The host waits for the device once, for all of them; again only for items that are drawn again, or are out of range.
    """
    read = _read(batches)
    return [_outcomes(solved, *numbers) for solved, numbers in zip(batches, read, strict=True)]


def accepted(outcome: Outcome, *, allow_inexact: bool) -> Decomposition[Any]:
    """The answer. Raises the error that stands beside it, unless an inexact answer will do."""
    found, error = outcome
    if found is None or (error is not None and not allow_inexact):
        assert error is not None
        raise error
    return found


def _read(batches: Sequence[Solved | SolvedUnlike]) -> list[tuple[list[float], list[int], list[float]]]:
    """Of each batch the residuals, iterations and, where entries were not measured, largest magnitudes, an item each."""
    told = [_told(solved) for solved in batches]
    values: dict[torch.device, list[float]] = {}
    for device in dict.fromkeys(parts[0].device for parts, _ in told):
        # Numbers of iterations are exact in float64.
        here = [part for parts, _ in told if parts[0].device == device for part in parts]
        values[device] = (torch.cat(here) if len(here) > 1 else here[0]).tolist()
    at, read = dict.fromkeys(values, 0), []
    for parts, counts in told:
        device, numbers = parts[0].device, []
        for count in counts:
            numbers.append(values[device][at[device] : at[device] + count])
            at[device] += count
        read.append((numbers[0], [int(steps) for steps in numbers[1]], numbers[2]))
    return read


def _told(solved: Solved | SolvedUnlike) -> tuple[list[Tensor], tuple[int, int, int]]:
    """Parts that make up residuals, iterations and largest magnitudes, and how many there are of each."""
    if isinstance(solved, SolvedUnlike):
        items = len(solved.answers.exact)
        return [solved.answers.told.view(-1)], (items, items, items)
    residual, iterations, largest = solved.answer.residual, solved.answer.iterations, _largest(solved)
    return [residual, iterations, *largest], (len(residual), len(iterations), sum(map(len, largest)))


def _largest(solved: Solved) -> list[Tensor]:
    """Parts of (B,): the largest magnitude in each item of weights that were not measured before."""
    if solved.problems[0].measured:
        return []
    weights = [p.weight for p in solved.problems]
    if all(len(weight) == 1 for weight in weights):
        return [norm.view(1) for norm in torch._foreach_norm(weights, torch.inf)]
    return [torch.linalg.vector_norm(weight, torch.inf, dim=tuple(range(1, weight.ndim))) for weight in weights]


def _outcomes(
    solved: Solved | SolvedUnlike, residual: list[float], iterations: list[int], largest: list[float]
) -> list[Outcome]:
    dtype = solved.problems[0].weight.dtype
    starts = list(itertools.accumulate((len(p.weight) for p in solved.problems), initial=0))
    parts = [slice(*ends) for ends in itertools.pairwise(starts)]
    strange = [not are_in_range(largest[part], dtype) for part in parts]
    limit = tolerance(dtype)
    if isinstance(solved, SolvedUnlike):
        answers, converged = _answers_unlike(solved.answers, parts), solved.answers.exact
    else:
        fine = [item for odd, part in zip(strange, parts, strict=True) if not odd for item in range(len(residual))[part]]
        answer, residual, iterations = _drawn_again(solved, fine, residual, iterations)
        answers, converged = [answer.of(part) for part in parts], answer.residual <= limit
    outcomes: list[Outcome] = []
    for odd, part, own, problem, seed in zip(strange, parts, answers, solved.problems, solved.seeds, strict=True):
        if odd:
            outcomes.append(_in_range(problem, seed))
            continue
        exact = all(value <= limit for value in residual[part])
        worst = math.nan if any(map(math.isnan, residual[part])) else max(residual[part], default=0.0)
        found = _decomposition(problem, own, converged[part], iterations[part], worst)
        outcomes.append((found, None if exact else InexactMorphError(_inexact(problem, worst, limit), found)))
    return outcomes


def _answers_unlike(found: ClosedForms, parts: Sequence[slice]) -> list[_Answer]:
    residual, steps, _ = found.told
    none = steps.view(torch.int64)  # zero has the same bits
    trace = residual.new_empty(0, len(residual))
    pairs = zip(found.kernels, parts, strict=True)
    return [_Answer(*kernels, residual[part], trace[:, part], none[part]) for kernels, part in pairs]


def _drawn_again(
    solved: Solved, fine: Sequence[int], residual: list[float], iterations: list[int]
) -> tuple[_Answer, list[float], list[int]]:
    """The answer, with those of the `fine` items solved once more that are not exact, where the solver draws again."""
    first, equation, answer = solved.problems[0], solved.equation, solved.answer
    _, co, ci = equation.sizes
    for _ in range(first.choice.solver.draws(co, ci, first.hidden, first.frame) - 1):
        worse = [item for item in fine if not residual[item] <= _comfort(equation.dtype)]
        if not worse:
            break
        bad = torch.tensor(worse).to(answer.residual.device)
        again = replace(equation.subset(bad, equation.frame), full=True)
        answer = answer.improved(_attempt(again, first.choice.solver), bad)
        residual, iterations = answer.residual.tolist(), answer.iterations.tolist()
    return answer, residual, iterations


def _in_range(problem: Checked, seed: int) -> Outcome:
    """What becomes of a problem whose entries were out of range."""
    try:
        ((outcome,),) = look_at([solve_alike([replace(problem.in_range(), measured=True)], [seed])])
    except MorphError as error:
        return None, error
    return outcome


def _comfort(dtype: torch.dtype) -> float:
    """A residual above which another draw is worth its while.

    Rounding leaves a residual of |F2| |F1| / |G| times the unit roundoff. Where that factor is large the answer may still be
    exact, but the child's forward pass would round by as much at every pixel.
    """
    return tolerance(dtype) * (0.1 if torch.finfo(dtype).bits >= 32 else 0.5)


class _Answer(NamedTuple):
    """Rounded kernels with their residual (B,), trace (steps, B) and iterations (B,)."""

    first: Tensor
    second: Tensor
    residual: Tensor
    trace: Tensor
    iterations: Tensor

    def of(self, part: slice) -> _Answer:
        """That of some of its items."""
        return _Answer(self.first[part], self.second[part], self.residual[part], self.trace[:, part], self.iterations[part])

    def improved(self, other: _Answer, items: Tensor) -> _Answer:
        """This answer, with another one for some of its items where that is better; the work of both is told."""
        before = self.residual[items]
        better = (other.residual < before) | before.isnan()
        kept = [value.index_copy(0, items[better], new[better]) for value, new in zip(self[:3], other[:3], strict=True)]
        trace = self.trace.new_full((len(other.trace), len(self.residual)), torch.nan)
        trace[:, items] = other.trace
        iterations = self.iterations.index_add(0, items, other.iterations)
        return _Answer(kept[0], kept[1], kept[2], torch.cat([self.trace, trace]), iterations)


def _attempt(equation: Equation, solver: Solver) -> _Answer:
    by_reference: Callable[[Equation], Solution] = partial(_by_reference, solver)
    solution = equation.backend.implementation(solver.solve, by_reference)(equation)
    first, second = _rounded(equation, solution, solver)
    residual = residual_of(equation, first, second, estimate=solver.closed_form)
    return _Answer(first, second, residual, solution.trace, solution.iterations)


def _by_reference(solver: Solver, equation: Equation) -> Solution:
    draws: list[np.ndarray] = []  # every item takes its rows of the same draws, as a batch would

    def noise_for(item: int) -> reference.Draw:
        calls = iter(range(2**30))

        def draw(*shape: int) -> reference.Array:
            call = next(calls)
            if call == len(draws):
                draws.append(equation.noise(*shape).cpu().numpy())
            return draws[call][item]

        return draw

    found = [
        solver.reference(weight, equation.hidden, equation.frame, noise_for(item), equation.tolerance)
        for item, weight in enumerate(equation.weight.to(equation.work).cpu().numpy())
    ]
    steps = max((len(f.trace) for f in found), default=0)
    trace = torch.tensor([[*f.trace, *[torch.nan] * (steps - len(f.trace))] for f in found], dtype=torch.float64)
    trace = trace.reshape(len(found), steps).T
    frame, (_, co, ci) = equation.frame, equation.sizes
    first = torch.tensor(np.array([f.first for f in found])).reshape(-1, equation.hidden, ci, *frame.first)
    second = torch.tensor(np.array([f.second for f in found])).reshape(-1, co, equation.hidden, *frame.second)
    device = equation.weight.device
    return Solution(first.to(device), second.to(device), trace.to(device), (~trace.isnan()).sum(0).to(device))


def _rounded(equation: Equation, solution: Solution, solver: Solver) -> tuple[Tensor, Tensor]:
    """Equal standard deviations (a closed form has seen to its own), and the answer's dtype."""
    first, second = solution.first, solution.second
    if not solver.closed_form:
        if equation.dtype != first.dtype:
            first, second = balance(first, second)
        first, second = equalise(first, second, equation.work if equation.corrected else equation.dtype)
    if equation.corrected:
        # Two coarse roundings would add up: F2 is solved again against the F1 that is kept, and makes up for it.
        first, second = first.to(equation.dtype).to(equation.work), second.to(equation.work)
        step = HalfStep(first, equation.frame.second, equation.backend)
        error, _ = step.error(equation.weight.to(first.dtype), equation.frame.before, second)
        second = second + step.solve(error, (0,) * len(equation.frame.before))
    return first.to(equation.dtype), second.to(equation.dtype)


def _decomposition(
    problem: Checked, answer: _Answer, converged: Tensor, iterations: list[int], worst: float
) -> Decomposition[Any]:
    shape, restore, solver = problem.batch_shape, problem.restore, problem.choice.solver
    first, second = answer.first, answer.second
    if problem.exponents is not None:  # each kernel takes half of what the weight was divided by
        first = times_power_of_two(first, [e // 2 for e in problem.exponents])
        second = times_power_of_two(second, [e - e // 2 for e in problem.exponents])
    co, ci = problem.weight.shape[1:3]
    return Decomposition(
        first=restore(first.reshape(*shape, *first.shape[1:])),
        second=restore(second.reshape(*shape, *second.shape[1:])),
        residual=restore(answer.residual.reshape(shape)),
        iterations=restore(answer.iterations.reshape(shape)),
        converged=restore(converged.reshape(shape)),
        solver=solver,
        reason=problem.choice.reason,
        cost=sum(solver.cost(co, ci, problem.hidden, problem.frame, steps) for steps in iterations),
        trace=restore(answer.trace.reshape(len(answer.trace), *shape)),
        estimated=solver.closed_form and max(co, ci) > MEASURED,
        worst=worst,
    )


def _inexact(problem: Checked, residual: float, limit: float) -> str:
    co, ci = problem.weight.shape[1:3]
    return (
        f"{problem.choice.solver} left a relative residual of {residual:.1e} for a weight of {co} x {ci} channels, size "
        f"{problem.frame.kernel}, split at {problem.hidden} hidden channels into {problem.frame.first} and "
        f"{problem.frame.second}; exact for {problem.weight.dtype} means at most {limit:.1e}. Give it more hidden channels "
        f"or iterations, or pass allow_inexact=True to take the answer as it is."
    )
