"""The transaction in which the operators of a plan work on one model.

Operators change its `model` in place and hand their equations over instead of solving them, so that a whole plan is solved in
one call of `decompose_many`, however many layers it has. Until then the weights of new layers stand on the meta device,
where nothing can read them by mistake; an operator that needs a model's or a layer's weights settles them first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from time import perf_counter
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmorph.certify.compare import Comparison
from fastmorph.certify.readings import Reading
from fastmorph.equation.problem import Problem
from fastmorph.equation.randomness import Stream
from fastmorph.errors import MorphError
from fastmorph.graph.structure import Structure, follow
from fastmorph.graph.trail import Walked
from fastmorph.inputs import Inputs
from fastmorph.plan.equations import Answered, Assign, Equation, solved
from fastmorph.plan.layers import Layer, find_layer
from fastmorph.plan.memory import check_sizes
from fastmorph.plan.order import Decided, Reach, decide, interleaved, is_wide, may_move, neighbours, turns_of
from fastmorph.plan.patterns import expanded
from fastmorph.plan.plain_layer import make_plain
from fastmorph.plan.step import Step
from fastmorph.plan.tensors import Tensors
from fastmorph.plan.watch import Piece, Surroundings


class Operator(Protocol):
    """A morph as a frozen dataclass; see `fastmorph.plan.operators` for what it may hold and do.

    A class may have a static method apply_together(operators, transaction) as well: neighbours in a plan are handed to it
    together, and it notes what each of them did (`Transaction.step`). A class attribute local = True says that an operator
    changes what stands under its target's name alone, found by `find_layer`, and keeps what that computes: then the code around
    the layer is watched, see `fastmorph.plan.watch`. An attribute replaces = True of its own class says that an operator writes
    into no tensor that the model has, and puts new ones in their places, so that none need be copied before. A method
    reach(structure) tells the modules whose tensors it changes, so that it may have its turn before local ones, see
    `fastmorph.plan.order`.
    """

    @property
    def target(self) -> str:
        """Dotted name of the module that it changes, as the operators before it in the plan left it."""

    def apply(self, transaction: Transaction) -> None:
        """Change `transaction.model` in place. Raises MorphError where that cannot be exact."""


@dataclass(eq=False)
class Transaction(Tensors):
    """One transaction on one model.

    Attributes:
        seed: of all noise; the same seed, plan, parent and settings give the same bits.
        example_inputs: a call of the model, for operators that trace it; None where none was given.
        guessed: shapes and dtypes, on the meta device, of a call on which the model runs, where none was given.
        walked: what the model does on that call as it is given, where that is known.
        structure: the structure of `model` as it stands, where it has been followed; None: whoever needs it follows it.
        watches: which local operators' layers are compared by themselves, before and after: "all", or "untouched", those
            that the run on `call` does not reach; None: none.
        solving: `solver`, `backend`, `allow_inexact`, `memory_budget` and `progress` of `decompose_many`.
        norms: the BatchNorms that operators inserted, to be calibrated.
        steps: what each operator did.
        readings: how outputs that became larger are read as the parent's.
        untouched: parameters that the model does not use in eval mode, as far as it was followed.
        compared: what was found where layers were compared by themselves.
    """

    seed: int = 0
    example_inputs: Inputs | None = None
    guessed: Inputs | None = None
    walked: Walked | None = None
    structure: Structure | None = None
    watches: Literal["all", "untouched"] | None = None
    solving: dict[str, Any] = field(default_factory=dict)
    norms: list[nn.Module] = field(default_factory=list, init=False)
    steps: list[Step] = field(default_factory=list, init=False)
    readings: list[Reading] = field(default_factory=list, init=False)
    untouched: tuple[str, ...] = field(default=(), init=False)
    compared: list[Comparison] = field(default_factory=list, init=False)
    _around: Surroundings | None = field(default=None, init=False)
    _pieces: list[Piece] = field(default_factory=list, init=False)
    _resolved: list[tuple[Operator, Operator]] = field(default_factory=list, init=False)
    _ran: list[Operator] = field(default_factory=list, init=False)
    _drawn: Counter[tuple[str, ...]] = field(default_factory=Counter, init=False)
    _queue: list[Equation] = field(default_factory=list, init=False)
    _operator: Operator | None = field(default=None, init=False)
    _reach: dict[int, Reach] = field(default_factory=dict, init=False)

    @property
    def call(self) -> Inputs | None:
        """What to follow the network on: shapes and dtypes alone are of a meaning there. None: not known."""
        return self.guessed if self.example_inputs is None else self.example_inputs

    def noise(self, *names: str) -> Stream:
        """Noise for a purpose of these names (an operator, a layer, ...); every call with the same names gives other noise."""
        self._drawn[names] += 1
        return Stream(self.seed).of(*names, self._drawn[names])

    def run(self, operators: Iterable[Operator], advance: Callable[[int], object] = lambda count: None) -> None:
        """Run operators in order, or so that the same comes of it: see `fastmorph.plan.order`.

        Neighbours of one class that can be applied together are. `advance` is told how many have been run.

        Raises MorphError, besides what they raise, for absurd sizes.
        """
        for movable, stretch in groupby(operators, may_move):
            written = list(stretch)
            while written:
                structure = self._structure() if movable and interleaved([is_wide(operator) for operator in written]) else None
                if structure is None:
                    self._run(written, advance)
                    break
                decided = decide(written, structure, self.model)
                if decided:
                    self._run_in_turns(decided, advance)
                    count = decided[-1].written + 1
                else:  # the first is to be refused
                    self._run(first := neighbours(written)[0], advance)
                    count = len(first)
                written = written[count:]
        self._leave()

    def _run(self, operators: Sequence[Operator], advance: Callable[[int], object]) -> None:
        for written in neighbours(operators):
            kind = type(written[0])
            if not getattr(kind, "local", False):
                self._leave()
            together = getattr(kind, "apply_together", None)
            if together is not None:
                group = [each for operator in written for each in expanded(operator, self.model)]
                self._check(group)
                together(group, self)
                advance(len(written))
                continue
            for operator in written:
                for each in expanded(operator, self.model):
                    self._check([each])
                    self.forget_places()
                    with self.step(each):
                        each.apply(self)
                    self.structure = None
                advance(1)

    def followed(self, *, taped: bool = False) -> Structure:
        """The structure of `model` as it stands, followed where it has not been; parameters without use are noted.

        `taped` says that a stream is to grow, see `follow`.

        Raises MorphError where it cannot be followed.
        """
        self.structure = self.structure or follow(self.model, self.example_inputs, taped=taped)
        used = self.structure.record.used
        self.untouched = self.untouched or tuple(name for name, _ in self.model.named_parameters() if name not in used)
        return self.structure

    def _structure(self) -> Structure | None:
        """None where the model cannot be followed as it stands: then operators have their turns as written, and say so."""
        try:
            self.structure = self.structure or follow(self.model, self.example_inputs)
        except MorphError:
            return None
        return self.structure

    def _run_in_turns(self, decided: Sequence[Decided], advance: Callable[[int], object]) -> None:
        """Run operators in the turns of `fastmorph.plan.order`; what they did is noted in the order that was written."""
        wide = [is_wide(one.operator) for one in decided]
        began, order = (len(self.steps), len(self._ran), len(self._resolved)), list[int]()
        self._reach = {id(one.operator): Reach(one.reach) for one in decided}
        left = Counter(one.written for one in decided)

        def run(turn: Sequence[int]) -> None:
            places = iter(turn)

            def done(count: int) -> None:
                for place in islice(places, count):
                    left[decided[place].written] -= 1
                    advance(int(not left[decided[place].written]))

            self._run([decided[place].operator for place in turn], done)

        for turn in turns_of(decided):
            steps, ran = len(self.steps), len(self._ran)
            self.settle()  # so that what fails below has changed nothing
            try:
                run(turn)
            except MorphError:
                if len(self.steps) > steps or not wide[turn[0]]:
                    raise
                # One is to be refused, or found in another way, at its own place.
                del self._ran[ran:]
                self._reach.clear()
                rest = [place for place in range(len(decided)) if place not in set(order)]
                run(rest)
                order += rest
                break
            order += turn
        self._reach.clear()
        places = sorted(range(len(order)), key=order.__getitem__)
        self.steps[began[0] :] = [self.steps[began[0] + place] for place in places]
        self._ran[began[1] :] = [self._ran[began[1] + place] for place in places]
        known = {id(operator): place for place, operator in enumerate(self._ran)}
        self._resolved[began[2] :] = sorted(self._resolved[began[2] :], key=lambda pair: known[id(pair[0])])

    def check_reach(self, operator: Operator, modules: Iterable[str]) -> None:
        """Raise MorphError where an operator, which has its turn before others, is about to change more than was known then."""
        reach = self._reach.get(id(operator))
        if reach is not None and not all(map(reach.covers, modules)):
            raise MorphError(f"layer {operator.target!r} grows in another way than the first; it is found at its own place.")

    def _watch(self, layer: Layer, plain: Layer) -> None:
        """Note what the network does with a layer that a local operator is about to change, and what the layer does."""
        if not getattr(type(self._operator), "local", False) or not self.with_weights:
            return
        if self._around is None:
            unchanged = len(self.steps) <= 1
            self._around = Surroundings(self.model, self.call, self.walked if unchanged else None)
            self.untouched = self.untouched or self._around.untouched
        new = self._around.check(self.model, layer)
        if not new and not self.consume:  # a piece of what is compared in the end
            return
        wanted = self.watches == "all" or (self.watches == "untouched" and not self._around.touches(layer))
        if wanted and plain.origin.device.type != "meta":
            self._pieces.append(Piece(layer, plain, exact=not self.consume))

    def _leave(self) -> None:
        """End a stretch of local operators: compare what is around their layers, and the layers where that is asked for."""
        if self._around is not None:
            self._around.compare(self.model)
            self._around = None
        self._compare_pieces()

    def _compare_pieces(self) -> None:
        if self._pieces:
            self.settle()
        for piece in self._pieces:
            self.compared += piece.compare(self.model)
        self._pieces.clear()

    def resolve(self, operator: Operator) -> None:
        """Say what the operator that is being applied comes to with its defaults decided: histories hold that."""
        if self._operator is not None:
            self._resolved.append((self._operator, operator))

    def resolved(self) -> tuple[Operator, ...]:
        """The operators that were run, in their order, each as `resolve` has it."""
        left = list(self._resolved)
        return tuple(left.pop(0)[1] if left and left[0][0] is operator else operator for operator in self._ran)

    def _check(self, operators: Sequence[Operator]) -> None:
        self._ran += operators
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for operator in operators:
            check_sizes(operator, operator.target, modules.get(operator.target))

    @contextmanager
    def step(self, operator: Operator) -> Iterator[Step]:
        """Note what an operator does inside."""
        began, target = perf_counter(), operator.target
        self._step = step = Step(target, next(iter(self.kernel_shapes(target)), ()))
        self.steps.append(step)
        self._operator = operator
        yield step
        step.after = self.kernel_shapes(target)
        self._step = self._operator = None
        step.milliseconds += 1e3 * (perf_counter() - began)
        if self.consume:  # layer by layer, so that each old weight is gone before the next new one comes
            self.settle()
            self._compare_pieces()

    def say(self, note: str) -> None:
        """Note what else the operator that is being applied does: see `Step.note`."""
        if self._step is not None:
            self._step.note = note

    def kernel_shapes(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The shapes of the weights, of two or more dimensions, that stand under a name; none where that is no module's."""
        try:
            module = self.model.get_submodule(name)
        except AttributeError:  # no layer: the operator says so
            return ()
        weights = (part._parameters.get("weight") for part in module.modules())
        return tuple(tuple(w.shape) for w in weights if w is not None and not is_lazy(w) and w.ndim > 1)

    # --- equations ------------------------------------------------------------------------------------------------------------

    def find_layer(self, name: str, *, transposed: bool = False, stays: bool = False) -> Layer:
        """The layer called `name`, its weights settled; see `fastmorph.plan.layers.find_layer`.

        Unless it stays what it is, one that computes its weight is made a plain one first.
        """
        layer = find_layer(self.model, name, transposed=transposed)
        self.settle(layer.module)
        if layer.is_plain or (stays and isinstance(layer.module, layer.rule.plain)):
            self._watch(layer, layer)
            return layer
        plain, whole = make_plain(layer)
        self._watch(layer, plain)
        self.replace_module(layer.module, whole, near=layer.origin)
        return plain

    def solve(
        self, problem: Problem[Tensor], assign: Assign, *, layer: str, modules: Sequence[nn.Module], part: str = ""
    ) -> None:
        """Queue an equation.

        Args:
            problem: the equation, its weight of any batch dimensions (groups).
            assign: called with the answer, to set weights (`fill`); it may queue further equations. Not called without weights.
            layer: the name that errors give.
            modules: whose weights are not to be read before the answer is there.
            part: of what the equation is, for errors, where a layer needs several.
        """
        if self.with_weights:
            seed = self.noise("equation", layer, part).seed
            self._queue.append(Equation(problem, assign, layer, part, tuple(modules), seed, self._step))

    def settle(self, *modules: nn.Module) -> None:
        """Solve everything queued, in one `decompose_many`, and assign the answers.

        With modules given, only if one of them, or of their submodules, waits for an answer. Equations that an answer leads to
        (chains) follow in further rounds.

        Raises MorphError and InexactMorphError as `decompose_many` does, with the layer.
        """
        if modules and not self._is_pending(*modules):
            return
        while self._queue:
            queue, self._queue = self._queue, []
            waiting = [(equation.step, equation.assign) for equation in queue]
            further: dict[int, list[Equation]] = {}
            for index, answer, milliseconds in self._answers(queue):
                step, assign = waiting[index]
                if step is not None:
                    step.add(answer, milliseconds)
                with self._resumed(step):
                    assign(answer)
                further[index], self._queue = self._queue, []
            self._queue = [equation for index in sorted(further) for equation in further[index]]

    def _is_pending(self, *modules: nn.Module) -> bool:
        pending = {module for equation in self._queue for module in equation.modules}
        return any(part in pending for module in modules for part in module.modules())

    def _answers(self, queue: list[Equation]) -> Iterator[Answered]:
        """The answers to equations, which leave the queue."""
        return solved(queue, self.solving)

    @contextmanager
    def _resumed(self, step: Step | None) -> Iterator[None]:
        """Let equations queued inside count for `step`."""
        current, self._step = self._step, step
        try:
            yield
        finally:
            self._step = current
