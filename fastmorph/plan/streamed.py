"""A transaction on a model whose tensors are elsewhere: they come one at a time, and what is made of them goes at once.

Operators see a model as any other. A weight's values come when an operator reads it (`fastmorph.elsewhere`), a new parameter is
put on the shelf as it is made, and equations are solved chunk by chunk, by the ranks together where there are several. So no
process holds more than one tensor, its successor and one chunk's workspace on top of what is on its shelf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from fastmorph.elsewhere import Elsewhere, Shelf, values_of
from fastmorph.equation.divided import Settings, sized, solve_divided
from fastmorph.equation.problem import Problem
from fastmorph.equation.randomness import draw_seeds
from fastmorph.errors import MorphError
from fastmorph.plan.equations import Answered, Assign, Equation, of_layer
from fastmorph.plan.step import Step
from fastmorph.plan.transaction import Operator, Transaction
from fastmorph.ranks import Ranks


@dataclass(eq=False, kw_only=True)
class Streamed(Transaction):
    """A `Transaction` on a model of `Elsewhere` parameters.

    Attributes:
        shelf: where new parameters are put.
        ranks: the processes that make the same transaction together; None: this one alone.
    """

    shelf: Shelf
    ranks: Ranks | None = None
    _settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        given = {key: value for key, value in self.solving.items() if key != "progress"}
        self._settings = Settings(**given)

    def keep(self, value: nn.Parameter) -> nn.Parameter:
        """The parameter, its values on the shelf."""
        kept = self.shelf.keep(value.detach())
        return nn.Parameter(kept, value.requires_grad) if isinstance(kept, Elsewhere) else value

    @property
    def late(self) -> bool:
        """Whether the shelf says so."""
        return self.shelf.late

    def compute(self, like: Tensor, shape: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, when it is read, where the shelf says so."""
        if not self.late or not isinstance(like, nn.Parameter):
            return super().compute(like, shape, make)
        meta = torch.empty(tuple(shape), dtype=like.dtype, device="meta")
        return self.shelf.of(meta, like.device, make)

    def solve(
        self, problem: Problem[Tensor], assign: Assign, *, layer: str, modules: Sequence[nn.Module], part: str = ""
    ) -> None:
        """Queue an equation; a weight that was computed waits on the shelf."""
        if not isinstance(problem.weight, Elsewhere):
            problem = replace(problem, weight=self.shelf.keep(problem.weight))
        super().solve(problem, assign, layer=layer, modules=modules, part=part)

    @contextmanager
    def step(self, operator: Operator) -> Iterator[Step]:
        """Note what an operator does inside, and put the parameters of its new modules on the shelf."""
        with super().step(operator) as step:
            yield step
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not isinstance(parameter, Elsewhere) and not parameter.is_meta:
                    kept = self.keep(parameter)
                    if kept is not parameter:
                        module._parameters[name] = kept
                        self.lineage.renamed(parameter, kept)
        self.shelf.let_go()

    def _answers(self, queue: list[Equation]) -> Iterator[Answered]:
        problems, seeds = [equation.problem for equation in queue], [equation.seed for equation in queue]
        try:
            checked = [sized(self._settings.check(problem, index)) for index, problem in enumerate(problems)]
            self.shelf.let_go()
            began = perf_counter()
            for index, answer in solve_divided(
                problems,
                checked,
                draw_seeds(seeds, len(seeds)),
                self._settings,
                lambda index, rank: values_of(problems[index].weight),
                self.ranks,
            ):
                self.shelf.let_go()
                yield index, answer, 1e3 * (perf_counter() - began)
                began = perf_counter()
        except MorphError as error:
            raise of_layer(error, queue) from None
