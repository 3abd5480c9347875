"""A plan on a sharded parent: one transaction by all ranks together, on shards, into the shards of a new child."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from tqdm.auto import tqdm

from fastmorph.certify.certificate import Certificate
from fastmorph.context import plain_context
from fastmorph.distributed.certificate import certify
from fastmorph.distributed.optimizer import carry_shards, check_sharded_optimizer
from fastmorph.distributed.shards import RankShelf, parameter_like
from fastmorph.distributed.unsharded import inner, is_sharded, plain_name, reshard, unsharded
from fastmorph.elsewhere import Elsewhere, on_meta
from fastmorph.equation.randomness import Generator, draw_seed
from fastmorph.equation.solvers import Auto, Solver
from fastmorph.errors import MorphError
from fastmorph.graph.clone import clone
from fastmorph.inputs import as_call
from fastmorph.plan.history import remember
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.morph import Morphed
from fastmorph.plan.parents import guard_saving, savable
from fastmorph.plan.plan import Plan
from fastmorph.plan.streamed import Streamed
from fastmorph.plan.transaction import Operator
from fastmorph.ranks import Ranks

Parallelize = Callable[[nn.Module], nn.Module | None]


@plain_context()
def morph(
    parent: nn.Module,
    plan: Plan | Sequence[Operator] | Operator,
    *,
    mesh: DeviceMesh | None = None,
    parallelize: Parallelize | None = None,
    example_inputs: Any = None,
    optimizer: Optimizer | None = None,
    architecture: Callable[[], nn.Module] | None = None,
    verify: bool = True,
    memory_budget: int = 2**31,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    precision: str | None = None,
    generator: Generator = None,
    allow_inexact: bool = False,
    progress: bool = False,
) -> Morphed[nn.Module]:
    """Apply a plan to a parent that is sharded over ranks, or copied to them; all of them call this with the same plan.

    The child has the bits that `fastmorph.morph` gives it in one process, with the same number of threads, whatever the number
    of ranks. No rank ever holds more than one full parameter, its successor, and the workspace of one batched solve (see
    `memory_budget`) beside its shards of parent and child, except where the models themselves run, for the certificate.

    Args:
        parent: sharded by `fully_shard`, by tensor parallel or both, in DistributedDataParallel, or whole on each rank. It is
            not touched, but for parameters that a forward left gathered, which are let go.
        plan: as in `fastmorph.morph`.
        mesh: the ranks that take part, of one dimension or all of them; None: all.
        parallelize: shards or wraps the child as the parent was, in place or by returning another module. Where the parent
            is sharded it gets the child's architecture on the meta device. None: the child is whole on each rank.
        example_inputs: this rank's, as in `fastmorph.morph`, of equal shapes on all ranks.
        optimizer: the parent's; its state is carried over shard by shard.
        architecture: builds the parent's network as it was before it was sharded, without weights that matter; None: its own
            classes tell.
        verify: whether all ranks together run parent and child, in eval mode and their own dtype, and compare.
        memory_budget, solver, backend, precision, allow_inexact, progress: as in `fastmorph.morph`.
        generator: as in `fastmorph.morph`, equal on all ranks; None: the plan's seed, or one that the first rank draws.

    Raises:
        MorphError: on all ranks, where `fastmorph.morph` would raise it or one rank fails; the parent is as it was.
    """
    ranks = Ranks(_group(mesh))
    with ranks.together():
        model = inner(parent)
        plan = plan if isinstance(plan, Plan) else Plan(plan)
        sharded = is_sharded(model)
        if sharded and parallelize is None:
            raise MorphError("the parent is sharded; give parallelize=, the function that shards its architecture.")
        if verify and example_inputs is None:
            raise MorphError("the certificate needs example_inputs=, this rank's; or pass verify=False.")
        reshard(model)
        if optimizer is not None:
            check_sharded_optimizer(optimizer, model)
        given = None if example_inputs is None else as_call(example_inputs, model)
        seed = _seed(plan, generator, ranks)
        ranks.same("the plan", _told(plan))
        ranks.same("the shapes of example_inputs", plan.recorded((), None, given).inputs)

        shelf = RankShelf(ranks)
        twin, lineage = unsharded(model, shelf, None if architecture is None else _on_meta(architecture))
        shapes = savable(twin)
        transaction = Streamed(
            twin,
            lineage,
            shelf=shelf,
            ranks=ranks,
            seed=seed,
            example_inputs=plan.example_inputs(twin) if given is None else given,
            solving={
                "solver": solver,
                "backend": backend,
                "precision": precision,
                "allow_inexact": allow_inexact,
                "memory_budget": memory_budget,
            },
        )
        with tqdm(total=len(plan), desc="morphing", unit="layer", disable=not progress) as bar:
            transaction.run(plan, bar.update)
        transaction.settle()
        shelf.let_go()

        grown = transaction.model
        if sharded:
            child = clone(grown, {id(parameter): on_meta(parameter) for parameter in grown.parameters()})
            made = _parallelized(child, parallelize)
            _fill(inner(made), grown)
        else:
            child = clone(grown, {id(p): parameter_like(p, p) for p in grown.parameters()})
            made = _parallelized(child, parallelize)
        shelf.let_go()
        network = inner(made)
        guard_saving(network, shapes)
        carried: Optimizer | None = None
        twins: tuple[int, ...] = ()
        if optimizer is not None:
            carried, twins = carry_shards(optimizer, network, _of_child(transaction.lineage, grown, network), shelf)
        certificate: Certificate | None = None
        if verify and given is not None:
            certificate = certify(parent, made, given, ranks, transaction.readings)
            if not certificate and not allow_inexact:
                raise MorphError(f"the child does not compute what its parent computes:\n{certificate}")
        history = plan.recorded(transaction.resolved(), seed, given)
        remember(network, model, history)
    return Morphed(
        made, carried, certificate, history, tuple(transaction.steps), transaction.untouched, twins, tuple(transaction.readings)
    )


def _group(mesh: DeviceMesh | None) -> Any:
    """The process group of those who take part: an existing one."""
    if mesh is None or mesh.size() == torch.distributed.get_world_size():
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    raise MorphError(
        f"mesh={mesh} has {mesh.ndim} dimensions and not all ranks; pass one of one dimension (mesh[...]._flatten() makes one)."
    )


def _seed(plan: Plan, generator: Generator, ranks: Ranks) -> int:
    """The seed of all ranks: the given one, which must be the same; else the first rank's."""
    if generator is None:
        return ranks.from_rank(draw_seed(None) if plan.seed is None else plan.seed, 0)
    return ranks.same("the seed that generator= gives", draw_seed(generator))


def _told(plan: Plan) -> str:
    """What can be compared of a plan; of one that cannot be written, because of an activation without a name, its layers."""
    try:
        return plan.to_toml()
    except MorphError:
        return str([(type(operator).__name__, operator.target) for operator in plan])


def _on_meta(architecture: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return architecture()


def _parallelized(child: nn.Module, parallelize: Parallelize | None) -> nn.Module:
    made = None if parallelize is None else parallelize(child)
    return child if made is None else made


@torch.no_grad()
def _fill(child: nn.Module, grown: nn.Module) -> None:
    """Register in the child, in the place of each parameter on the meta device, one that holds this rank's shard.

    Raises MorphError for another network's parameters, and for one that no operator filled.
    """
    sources = dict(grown.named_parameters(remove_duplicate=False))
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in child.named_modules(remove_duplicate=False):
        for key, like in module._parameters.items():
            if like is None:
                continue
            name = plain_name(f"{path}.{key}" if path else key)
            source = sources.get(name)
            if source is None or source.shape != like.shape:
                raise MorphError(f"parallelize= changed the child: it has a parameter {name!r} of shape {tuple(like.shape)}.")
            if source.is_meta:
                raise MorphError(f"the parameter {name!r} of the child has no values: the operator that made it set none.")
            if not like.is_meta:
                raise MorphError(f"parallelize= gave {name!r} memory; it is to shard the network on the meta device alone.")
            if like not in made:
                made[like] = parameter_like(source, like)
                if isinstance(source, Elsewhere):
                    source.forget()
            module._parameters[key] = made[like]


def _of_child(lineage: Lineage, grown: nn.Module, child: nn.Module) -> Lineage:
    """The same ancestries for the child's own parameters, by name."""
    found = {plain_name(name): parameter for name, parameter in child.named_parameters(remove_duplicate=False)}
    return lineage.of_twins((parameter, found[name]) for name, parameter in grown.named_parameters())
