"""Equations that wait in a transaction, so that those of a whole plan are solved in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from fastmorph.equation.decomposition import Decomposition
from fastmorph.equation.many import decompose_many
from fastmorph.equation.problem import Problem
from fastmorph.errors import MorphError
from fastmorph.plan.step import Step

Assign = Callable[[Decomposition[Tensor]], None]
Answered = tuple[int, Decomposition[Tensor], float]  # an equation's number, its answer, and its milliseconds


@dataclass(eq=False)
class Equation:
    """A problem, what its answer sets, and whose it is; see `Transaction.solve`."""

    problem: Problem[Tensor]
    assign: Assign
    layer: str
    part: str
    modules: tuple[nn.Module, ...]
    seed: int
    step: Step | None

    @property
    def name(self) -> str:
        """What errors call it."""
        groups = self.problem.weight.shape[: -2 - self.problem.spatial_dims].numel()
        return f"layer {self.layer!r}{self.part and ', '}{self.part}" + (
            f" (each of its {groups} groups)" if groups > 1 else ""
        )


def solved(queue: list[Equation], solving: dict[str, Any]) -> Iterator[Answered]:
    """The answers to equations, by one `decompose_many`; they leave the queue."""
    began = perf_counter()
    try:
        answers = decompose_many([e.problem for e in queue], generator=[e.seed for e in queue], **solving)
    except MorphError as error:
        raise of_layer(error, queue) from None
    elapsed = 1e3 * (perf_counter() - began)
    total = sum(answer.cost for answer in answers) or 1.0
    queue.clear()  # and with it the weights that are no longer needed
    for index, answer in enumerate(answers):
        yield index, answer, elapsed * answer.cost / total


def of_layer(error: MorphError, queue: Sequence[Equation]) -> MorphError:
    """An error met in a queue's equations, with the layer that it is about."""
    return error if error.problem is None or error.inner is None else error.inner.within(queue[error.problem].name)
