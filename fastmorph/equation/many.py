"""Hundreds of equations of different shapes in as few batched solves as they allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from fastmorph.equation.arithmetic import exact_arithmetic
from fastmorph.equation.arrays import host_waits
from fastmorph.equation.by_ranks import decompose_by_ranks
from fastmorph.equation.chunks import chunks_of
from fastmorph.equation.decomposition import Array, Decomposition
from fastmorph.equation.divided import Settings
from fastmorph.equation.problem import Checked, Problem, check
from fastmorph.equation.randomness import Generator, draw_seeds
from fastmorph.equation.solve import accepted, look_at, solve_alike
from fastmorph.equation.solvers import Auto, Solver
from fastmorph.errors import MorphError
from fastmorph.ranks import Ranks


@torch.no_grad()
@exact_arithmetic()
def decompose_many(
    problems: Sequence[Problem[Array]],
    *,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    precision: str | None = None,
    generator: Generator | Sequence[int] = None,
    allow_inexact: bool = False,
    memory_budget: int = 2**31,
    progress: bool | None = None,
    process_group: Any = None,
    destination: int | None = None,
) -> list[Decomposition[Array]]:
    """Solve many equations; each gets the answer that `decompose` would give it, to rounding.

    Problems that agree in sizes, dtype, device and the solver chosen for them share a batched solve; with backend "triton",
    closed forms of any sizes. Every problem has noise
    of its own, seeded in the order of the list, so that neither its neighbours nor the budget change its answer.

    Args:
        problems: what to solve.
        solver, backend, precision, allow_inexact: as in `decompose`; `Auto` chooses for each problem.
        generator: as in `decompose`; one seed is drawn for each problem, in order. Or a list of their seeds.
        memory_budget: bytes that one batched solve may take on top of its weights; a bucket that would take more is solved in
            chunks, a single problem that would is solved alone.
        progress: show a progress bar; None: where standard error is a terminal.
        process_group: ranks that solve together, all of which call this with the same problems; a weight is on any of them, and
            None on the others. Each batch is solved by one rank, the costliest first, and every answer has the bits that one
            process alone would give it. None: this process alone.
        destination: the rank of the group that gets the answers, the others get a list of None; None: all do.

    Returns:
        Decompositions in the order of the problems.

    Raises:
        MorphError: a problem is unusable; the message says which, and so does the error's `problem`.
        RankError: a MorphError: another rank failed.
        InexactMorphError: an answer is not exact; the message and `problem` say which, and the error carries the answer.
    """
    if not isinstance(problems, Sequence):
        raise MorphError(f"problems is a {type(problems).__name__}; pass a list of fm.Problem, [problem] for one.")
    if process_group is not None:
        settings = Settings(solver, backend, precision, allow_inexact, memory_budget)
        return cast(Any, decompose_by_ranks(problems, Ranks(process_group), settings, generator, destination))
    checked: list[Checked] = []
    for index, problem in enumerate(problems):
        try:
            checked.append(check(problem, solver=solver, backend=backend, precision=precision, allow_inexact=allow_inexact))
        except MorphError as error:
            raise error.of_problem(index) from None
    seeds = draw_seeds(generator, len(checked))
    answers: dict[int, Decomposition[Array]] = {}
    with tqdm(total=len(checked), desc="solving", unit="equation", disable=None if progress is None else not progress) as bar:
        for chunks in _together(chunks_of(checked, memory_budget, unlike=True), checked, memory_budget):
            solved = [solve_alike([checked[i] for i in chunk], [seeds[i] for i in chunk]) for chunk in chunks]
            for chunk, outcomes in zip(chunks, look_at(solved), strict=True):
                for index, outcome in zip(chunk, outcomes, strict=True):
                    try:
                        answers[index] = accepted(outcome, allow_inexact=allow_inexact)
                    except MorphError as error:
                        raise error.of_problem(index) from None
                bar.update(len(chunk))
    return [answers[index] for index in range(len(checked))]


def _together(chunks: list[list[int]], problems: Sequence[Checked], memory_budget: int) -> Iterator[list[list[int]]]:
    """Chunks whose answers are looked at together: where that means to wait for a device, as many as the budget lets wait."""
    waiting: list[list[int]] = []
    held = 0
    for chunk in chunks:
        waiting.append(chunk)
        held += sum(problems[index].weight.nbytes for index in chunk)  # a batch keeps its weights until then
        if held > memory_budget or not host_waits(problems[chunk[0]].weight.device):
            yield waiting
            waiting, held = [], 0
    if waiting:
        yield waiting
