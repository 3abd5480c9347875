"""Running a plan: one transaction on a copy of the parent, with its equations, statistics, optimizer and certificate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Generic, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.readings import Reading
from fastmorph.certify.recorded import certify, record
from fastmorph.certify.verify import verify as verify_models
from fastmorph.context import plain_context
from fastmorph.equation.randomness import Generator, draw_seed
from fastmorph.equation.solvers import Auto, Solver
from fastmorph.errors import MorphError
from fastmorph.graph.clone import clone
from fastmorph.graph.structure import Structure
from fastmorph.graph.trail import walk_guessing
from fastmorph.inputs import as_call
from fastmorph.nn.computed import computed_copies
from fastmorph.plan.calibrate import calibrate_norms
from fastmorph.plan.guessed import described, random_values
from fastmorph.plan.history import remember
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.optimizers import carry_over, check_optimizer
from fastmorph.plan.parents import check_parent, check_targets, guard_saving, savable
from fastmorph.plan.plan import Plan
from fastmorph.plan.schedulers import rebound
from fastmorph.plan.step import Step
from fastmorph.plan.transaction import Operator, Transaction
from fastmorph.plan.watch import with_layers

M = TypeVar("M", bound=nn.Module)


class Options(TypedDict, total=False):
    """The options of `morph` that functions of one morph pass on; `morph` says what each means."""

    example_inputs: Any
    structure: Structure | None
    calibrate: Iterable[Any] | None
    verify: bool | str
    consume: bool
    memory_budget: int
    solver: Solver
    backend: str | None
    precision: str | None
    generator: Generator
    allow_inexact: bool
    progress: bool


@dataclass(frozen=True)
class Morphed(Generic[M]):
    """A finished plan.

    Attributes:
        model: the child, of the parent's class unless a plan replaces the model itself (the layer "").
        optimizer: a new optimizer for the child that goes on where the one given stood; None unless one was given.
        certificate: what was found on `example_inputs`, or where there were none (`certificate.on` says which), on random
            values of guessed shapes, if an operator follows the whole network; else for each new part and the layer that it
            replaces, on a random input of its own, as for layers that the inputs do not reach. None if nothing could be
            compared, or `verify=False`.
        history: the plan with its seed, all sizes and the shapes of `example_inputs`: `morph(parent, history)` gives the same
            bits, at the same settings on the same machine, but for what `calibrate` batches decided.
        steps: what each operator did.
        untouched: parameters of the parent that eval mode does not use on those inputs, as far as the network was followed:
            what is computed with them was not compared.
        readings: how outputs that became larger are read as the parent's, for `verify`.
    """

    model: M
    optimizer: Optimizer | None
    certificate: Certificate | None
    history: Plan
    steps: tuple[Step, ...] = field(repr=False)
    untouched: tuple[str, ...] = ()
    _twins: tuple[int, ...] = field(default=(), repr=False)  # the groups that the optimizer's last, new ones are twins of
    readings: tuple[Reading, ...] = field(default=(), repr=False)

    def rebind(self, scheduler: Any) -> Any:
        """A copy of a learning-rate scheduler of the parent's optimizer that drives `optimizer` from where it stands.

        Raises MorphError if there is no optimizer, or one of other parameter groups.
        """
        if self.optimizer is None:
            raise MorphError("there is no optimizer to drive; pass the parent's to morph(..., optimizer=).")
        return rebound(scheduler, self.optimizer, self._twins)


@plain_context()
def morph(
    model: M,
    plan: Plan | Sequence[Operator] | Operator,
    *,
    example_inputs: Any = None,
    structure: Structure | None = None,
    optimizer: Optimizer | None = None,
    calibrate: Iterable[Any] | None = None,
    verify: bool | str = True,
    consume: bool = False,
    memory_budget: int = 2**31,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    precision: str | None = None,
    generator: Generator = None,
    allow_inexact: bool = False,
    progress: bool = False,
) -> Morphed[M]:
    """Apply a plan to a copy of `model`, all of it or, where anything fails, none.

    Args:
        model: the parent. It is not touched, unless it is consumed.
        plan: morphs, in order, or a single one; each names layers as those before it left them.
        example_inputs: the arguments of one call, to verify the child on and for operators that follow channels through the
            model: a tensor, a tuple of positional arguments, a dict or named tuple of keywords, or a pair of such a tuple and
            such a dict. A dict, list or named tuple whose names are not the forward's is one argument.
        structure: what `fastmorph.follow` found in the model, for such operators, instead of following it again.
        optimizer: the parent's, of any class that wraps no other; it is not touched. Its options, moments and step counts are
            carried over, each moment as its weight where `optimizer_rule` knows how: `Morphed.optimizer`. Each group is in the
            order of the child's `parameters()`. New norms and P-activations join a group without weight decay; where there is
            none, a new last group without it is made for the `a` of P-activations.
        calibrate: batches (each as `example_inputs`) whose statistics inserted BatchNorms take; needed for the child to be
            nearly exact in train mode, where a BatchNorm uses the batch's own.
        verify: whether to compare parent and child, see `Morphed.certificate`: True in their own dtype and in float64,
            "outputs" in their own dtype alone, for half of the cost or less.
        consume: make the child out of the parent itself, layer by layer, each old tensor freed as soon as its successor is
            there, so that no more than the child and one layer's old weights and solver are held at a time. Whatever fails
            then leaves the parent half done, and of `optimizer` only what does not change. The child is compared with the
            parent's recorded outputs, in its own dtype alone.
        memory_budget: see `decompose_many`.
        solver: see `decompose`.
        backend: see `decompose`.
        precision: see `decompose`.
        generator: see `decompose`; one seed is drawn from it, which decides the child. None: the plan's seed, if it has one.
        allow_inexact: keep a child that is not exact instead of raising.
        progress: show progress bars.

    Raises:
        MorphError: a layer cannot be morphed, or the certificate does not hold.
        InexactMorphError: an equation was not solved exactly.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    check_parent(model)
    check_targets(model, plan)
    shapes = savable(model)
    if structure is not None:
        structure.check(model)
    if optimizer is not None:
        check_optimizer(optimizer, model)
    given = None if example_inputs is None else as_call(example_inputs, model)
    if verify not in (True, False, "outputs"):
        raise MorphError(f'verify takes True, False or "outputs", not {verify!r}.')
    seed = plan.seed if plan.seed is not None and generator is None else draw_seed(generator)
    known = plan.example_inputs(model) if given is None else given
    walked = walk_guessing(model) if known is None and structure is None else None
    guessed = None if walked is None else walked.call
    if known is None and structure is not None:
        guessed = structure.inputs
    # Local operators answer for their layers by themselves, for less than a run of the whole model costs.
    local = all(getattr(type(operator), "local", False) for operator in plan)
    call, compared = known or guessed, given if verify else None
    if verify and given is None and call is not None and not local:
        compared = random_values(call, model)
    before = record(model, compared) if consume and compared is not None else None
    replaces = all(vars(type(operator)).get("replaces", False) for operator in plan)
    transaction = Transaction(
        *((model, Lineage((p, p) for p in model.parameters())) if consume else _copied(model, shared=replaces)),
        seed=seed,
        example_inputs=known,
        guessed=guessed,
        walked=walked,
        consume=consume,
        structure=structure,
        watches=None if not verify else "all" if compared is None else "untouched",
        solving={
            "solver": solver,
            "backend": backend,
            "precision": precision,
            "allow_inexact": allow_inexact,
            "memory_budget": memory_budget,
            "progress": progress,
        },
    )
    with tqdm(total=len(plan), desc="morphing", unit="layer", disable=not progress) as bar:
        transaction.run(plan, bar.update)
    transaction.settle()
    child = transaction.model
    if replaces and not consume:
        _unshare(child, model)
    if calibrate is not None:
        there = set(child.modules())
        calibrate_norms(child, [norm for norm in transaction.norms if norm in there], calibrate)
    certificate = None
    if before is not None:
        certificate = certify(before, child, compared, transaction.readings)
    elif compared is not None:
        certificate = verify_models(
            model, child, *compared.args, kwargs=compared.kwargs, exact=verify is True, readings=transaction.readings
        )
    if certificate is not None and compared is not None and given is None:
        certificate = replace(certificate, on=", ".join(filter(None, (described(compared), certificate.on))))
    certificate = with_layers(certificate, transaction.compared, child)
    if certificate is not None and not certificate and not allow_inexact:
        raise MorphError(f"the child does not compute what its parent computes:\n{certificate}")
    guard_saving(child, shapes)
    carried: Optimizer | None = None
    twins: tuple[int, ...] = ()
    if optimizer is not None:
        carried, twins = carry_over(optimizer, child, transaction.lineage, consume=consume)
    history = plan.recorded(transaction.resolved(), seed, given)
    remember(child, model, history)
    return Morphed(
        cast(M, child),
        carried,
        certificate,
        history,
        tuple(transaction.steps),
        transaction.untouched,
        twins,
        tuple(transaction.readings),
    )


def morph_(
    model: M, plan: Plan | Sequence[Operator] | Operator, *, optimizer: Optimizer | None = None, **options: Unpack[Options]
) -> Morphed[M]:
    """`morph` in place, for those who hold references to a model: it becomes the child itself, by `consume=True`.

    Raises MorphError as `morph` does, and before any work for the model itself as a layer (""), which cannot be another object.
    A failure may leave the model half done: save it before.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    if any(operator.target == "" for operator in plan):
        raise MorphError('the model itself, the layer "", cannot be replaced in place; use morph, which returns the child.')
    options["consume"] = True
    return morph(model, plan, optimizer=optimizer, **options)


def grow(model: M, operators: Sequence[Operator], options: Options) -> M:
    """The child of `morph` alone, for functions of one morph. Raises MorphError for an optimizer, which would be lost."""
    if "optimizer" in options:
        raise MorphError("this function returns the model alone; carry an optimizer over by fastmorph.morph(..., optimizer=).")
    return morph(model, operators, **options).model


@plain_context()
def restructure(model: M, plan: Plan | Sequence[Operator] | Operator, *, example_inputs: Any = None) -> M:
    """The child's architecture alone, for a saved child's `load_state_dict`: no weights are set, nor the parent's copied.

    Buffers are: one may be no part of a `state_dict`.

    Args:
        model: the parent, or any network of its architecture, on the meta device too; it is not touched.
        plan: the plan that made the child, or `Morphed.history`.
        example_inputs: as in `morph`, for operators that follow channels through the model; None: those whose shapes and
            dtypes the plan has recorded.

    Raises:
        MorphError: a layer cannot be morphed.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    check_parent(model)
    check_targets(model, plan)
    shapes = savable(model)
    given = None if example_inputs is None else as_call(example_inputs, model)
    inputs = plan.example_inputs(model) if given is None else given
    transaction = Transaction(*_copied(model, with_weights=False), example_inputs=inputs, with_weights=False)
    transaction.run(plan)
    guard_saving(transaction.model, shapes)
    remember(transaction.model, model, plan if given is None else plan.recorded(plan.operators, plan.seed, given))
    return cast(M, transaction.model)


def _copied(model: nn.Module, *, with_weights: bool = True, shared: bool = False) -> tuple[nn.Module, Lineage]:
    """A copy and its lineage; `shared`: its parameters have the parent's memory, until `_unshare`."""
    memo = computed_copies(model)
    plain = [parameter for parameter in model.parameters() if type(parameter) is nn.Parameter]
    if not with_weights:
        memo |= {id(old): nn.Parameter(torch.empty_like(old), old.requires_grad) for old in plain}
    elif shared:
        plain = [old for old in plain if id(old) not in memo and not old.is_inference()]
        memo |= {id(old): nn.Parameter(old.detach(), old.requires_grad) for old in plain}
    computed = [
        (name, key)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo
    ]
    for name, key in computed:  # PyTorch refuses to copy these
        raise MorphError(
            f"the model cannot be copied: module {name!r} keeps a tensor {key!r} that it computed with gradients (pruning "
            f"does); bake it first, e.g. by torch.nn.utils.prune.remove(module, {key!r})."
        )
    for tensor in chain(model.parameters(), model.buffers()):
        memo.setdefault(id(tensor), deepcopy(tensor, memo))
    child = clone(model, memo)
    return child, Lineage(zip(child.parameters(), model.parameters(), strict=True))


def _unshare(child: nn.Module, model: nn.Module) -> None:
    """Give parameters of a child memory of their own where they still have its parent's."""
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if type(parameter) is nn.Parameter}
    for parameter in child.parameters():
        if type(parameter) is nn.Parameter and parameter.untyped_storage().data_ptr() in held:
            parameter.data = parameter.data.clone()
