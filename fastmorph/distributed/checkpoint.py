"""From one checkpoint of torch.distributed.checkpoint (DCP) to another: a grown network's, of as many ranks as one likes.

The directory is read and written tensor by tensor, whatever ranks wrote it and whatever will read it: no process group, no GPU,
and no more memory than one tensor, its successor and one equation take. DCP's files hold pickles, and so are to be trusted.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import SGD, AdamW, Optimizer

from fastmorph.context import plain_context
from fastmorph.elsewhere import Elsewhere, Shelf, values_of
from fastmorph.equation.randomness import Generator, draw_seed
from fastmorph.equation.solvers import Auto, Solver
from fastmorph.errors import MorphError
from fastmorph.inputs import as_call
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.morph import restructure
from fastmorph.plan.optimizers import carry_over
from fastmorph.plan.plan import Plan
from fastmorph.plan.streamed import Streamed
from fastmorph.plan.transaction import Operator
from fastmorph.scratch import DiskShelf

Place = tuple[Any, ...]  # the keys and numbers that lead to an entry in the nested state that was saved
_PLANS = "fastmorph.plans"
_CLASSES: dict[type[Optimizer], set[str]] = {
    AdamW: {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    SGD: {"momentum_buffer"},
}


@plain_context()
def grow_checkpoint(
    source: str | Path,
    out: str | Path,
    network: Callable[[], nn.Module],
    plan: Plan | Sequence[Operator] | Operator,
    *,
    example_inputs: Any = None,
    optimizer: type[Optimizer] | None = None,
    memory_budget: int = 2**31,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    precision: str | None = None,
    generator: Generator = None,
    allow_inexact: bool = False,
) -> Plan:
    """Read a network from a DCP directory, apply a plan to it, and write the child to another one.

    The child has the bits of `fastmorph.morph`. What else is in the checkpoint is copied. Parent and child are not run: what
    was solved is measured, and `fastmorph.verify` compares the two where they fit into memory.

    Args:
        source: the directory. The network's names may have a prefix there, such as "model."; an optimizer's state is what
            `get_optimizer_state_dict` gives, flattened or not.
        out: where to write; it must not exist, or be empty.
        network: builds the network before any growth, on the meta device; growths that the checkpoint tells of follow.
        plan: as in `fastmorph.morph`.
        example_inputs: as in `fastmorph.restructure`.
        optimizer: the class of the optimizer whose state is there; None: AdamW's and SGD's are told by their names.
        memory_budget, solver, backend, precision, generator, allow_inexact: as in `fastmorph.morph`.

    Returns:
        The plan with its seed and all sizes, which is in the new checkpoint too, see `checkpoint_plans`.

    Raises:
        MorphError: a layer cannot be morphed, or the checkpoint is not the network's.
    """
    source, out = Path(source), Path(out)
    if out.exists() and any(out.iterdir()):
        raise MorphError(f"{out} is not empty; write the child to a directory of its own.")
    checkpoint, plan = _Checkpoint(source), plan if isinstance(plan, Plan) else Plan(plan)
    plans = checkpoint.plans()
    with torch.device("meta"):
        model = network()
    for each in plans:
        model = restructure(model, each)
    given = None if example_inputs is None else as_call(example_inputs, model)
    seed = plan.seed if plan.seed is not None and generator is None else draw_seed(generator)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".growing", dir=out) as scratch:
        shelf = DiskShelf(Path(scratch))
        model, before, place = _placed(model, checkpoint, shelf)
        state = _OptimizerState.of(checkpoint, before, shelf, optimizer)
        transaction = Streamed(
            model,
            Lineage((parameter, parameter) for parameter in model.parameters()),
            shelf=shelf,
            seed=seed,
            example_inputs=plan.example_inputs(model) if given is None else given,
            solving={
                "solver": solver,
                "backend": backend,
                "precision": precision,
                "allow_inexact": allow_inexact,
                "memory_budget": memory_budget,
            },
        )
        transaction.run(plan)
        transaction.settle()
        child, history = transaction.model, plan.recorded(transaction.resolved(), seed, given)
        written: dict[Place, Any] = {place.of(name): value for name, value in child.state_dict(keep_vars=True).items()}
        gone = {place.of(name) for name in before}
        if state is not None:
            written |= state.grown(child, transaction.lineage, shelf)
            gone |= state.places
        others = {path: key for key, path in checkpoint.paths.items() if path not in gone and key != _PLANS}
        written |= {path: checkpoint.lazily(key, shelf) for path, key in others.items()}
        written[tuple(_PLANS.split("."))] = [each.to_toml() for each in (*plans, history)]
        whole: dict[Any, Any] = {}
        for path, value in written.items():
            into = whole
            for part in path[:-1]:
                into = into.setdefault(part, {})
            into[path[-1]] = value
        with _quiet():
            writer = FileSystemWriter(out, thread_count=1)
            save(whole, storage_writer=writer, planner=_Planner(shelf), no_dist=True)
    return history


def checkpoint_plans(path: str | Path) -> tuple[Plan, ...]:
    """The growths of the network in a DCP directory that `grow_checkpoint` wrote, in order; none in any other."""
    return _Checkpoint(Path(path)).plans()


class _Checkpoint:
    """A DCP directory, read entry by entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / ".metadata").is_file():
            raise MorphError(f"{path} is no directory that torch.distributed.checkpoint wrote: it has no .metadata.")
        self._reader = _Reader(path)
        found = self._reader.read_metadata()
        self.entries: Mapping[str, Any] = found.state_dict_metadata
        told = found.planner_data or {}
        self.paths: dict[str, Place] = {key: tuple(told.get(key, (key,))) for key in self.entries}

    def plans(self) -> tuple[Plan, ...]:
        return tuple(map(Plan.from_toml, self.read(_PLANS))) if _PLANS in self.entries else ()

    def read(self, key: str) -> Any:
        """An entry's value."""
        entry = self.entries[key]
        if isinstance(entry, TensorStorageMetadata):
            into: dict[str, Any] = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        else:
            into = {key: None}
        with _quiet():
            load(into, storage_reader=self._reader, no_dist=True)
        return into[key]

    def lazily(self, key: str, shelf: Shelf) -> Any:
        """An entry: a tensor as one whose values are elsewhere, anything else as it is."""
        entry = self.entries[key]
        if not isinstance(entry, TensorStorageMetadata) or not entry.size:
            return self.read(key)
        like = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        return shelf.of(like, torch.device("cpu"), lambda: self.read(key))

    def key_of(self, name: str, ends: str = "") -> Iterator[str]:
        """The keys that end in a name as a whole, and in what follows it."""
        tail = name + ends
        return (key for key in self.entries if key == tail or key.endswith(f".{tail}"))


class _Reader(FileSystemReader):
    """Reads the metadata once."""

    _found: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._found is None:
            self._found = super().read_metadata(*args, **kwargs)
        return self._found


class _Planner(DefaultSavePlanner):
    """Fetches each tensor as it is written."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()
        self._shelf = shelf

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """The values."""
        if isinstance(object, Elsewhere):
            object = values_of(object)
            self._shelf.let_go()
        return super().transform_object(write_item, object.detach() if isinstance(object, nn.Parameter) else object)


def _placed(
    model: nn.Module, checkpoint: _Checkpoint, shelf: Shelf
) -> tuple[nn.Module, dict[str, nn.Parameter | Tensor], _Pattern]:
    """The network with its tensors in the checkpoint; those by name; and where a name's tensor stands there."""
    names = list(model.state_dict(keep_vars=True))
    prefixes = [key[: len(key) - len(names[0])] for key in checkpoint.key_of(names[0])] if names else [""]
    fitting = [prefix for prefix in prefixes if all(prefix + name in checkpoint.entries for name in names)]
    if not fitting:
        lacking = next((n for n in names if (prefixes or [""])[0] + n not in checkpoint.entries), "")
        raise MorphError(
            f"{checkpoint.path} is not the network's: it has no {lacking!r}, under any prefix that the others have; network= "
            "must build what was saved, as it was before any growth."
        )
    prefix = min(fitting, key=len)
    found: dict[str, nn.Parameter | Tensor] = {}
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for register in (module._parameters, module._buffers):
            for key, old in register.items():
                name = f"{path}.{key}" if path else key
                if old is None or prefix + name not in checkpoint.entries:
                    continue
                size = tuple(checkpoint.entries[prefix + name].size)
                if size != tuple(old.shape):
                    raise MorphError(
                        f"{checkpoint.path} is not the network's: {name!r} has the shape {size} there and {tuple(old.shape)} "
                        "in what network= builds."
                    )
                if isinstance(old, nn.Parameter):
                    if id(old) not in made:
                        lazy = checkpoint.lazily(prefix + name, shelf)
                        made[id(old)] = nn.Parameter(lazy, old.requires_grad)
                    register[key] = found[name] = made[id(old)]
                else:
                    register[key] = found[name] = checkpoint.read(prefix + name)
    return model, found, _Pattern(checkpoint.paths[prefix + names[0]], names[0], "")


class _OptimizerState:
    """An optimizer's state in a checkpoint, as an optimizer of tensors that are elsewhere.

    Attributes:
        optimizer: that optimizer.
        places: of its entries.
    """

    def __init__(self, optimizer: Optimizer, places: set[Place], state: _Pattern, options: _Pattern | Place) -> None:
        self.optimizer, self.places = optimizer, places
        self._state, self._options = state, options  # a parameter's tensors; its options, or a list of groups

    @classmethod
    def of(
        cls, checkpoint: _Checkpoint, before: Mapping[str, Any], shelf: Shelf, kind: type[Optimizer] | None
    ) -> _OptimizerState | None:
        """None where there is none. Raises MorphError for a class that is not known."""
        parameters = {name: tensor for name, tensor in before.items() if isinstance(tensor, nn.Parameter)}
        state: dict[str, dict[str, str]] = {}
        for key in checkpoint.entries:
            head, _, moment = key.rpartition(".")
            name = head.partition("state.")[2]
            if name in parameters and head.endswith(f"state.{name}"):
                state.setdefault(name, {})[moment] = key
        if not state:
            return None
        moments = {moment for found in state.values() for moment in found}
        kind = kind or next((each for each, keys in _CLASSES.items() if moments <= keys), None)
        if kind is None:
            raise MorphError(f"{checkpoint.path} has an optimizer's {', '.join(sorted(moments))}: give its class, optimizer=.")
        name, found = next(iter(state.items()))
        moment, key = next(iter(found.items()))
        pattern = checkpoint.paths[key]
        groups, options, places = _groups(checkpoint, f"{key[: key.rindex(f'state.{name}')]}param_groups", parameters)
        places |= {checkpoint.paths[key] for found in state.values() for key in found.values()}
        made = kind([{**g, "params": [parameters[n] for n in g["params"]]} for g in groups], lr=1e-3)  # type: ignore[call-arg]
        for each, found in state.items():
            made.state[parameters[each]] = {moment: checkpoint.lazily(key, shelf) for moment, key in found.items()}
        return cls(made, places, _Pattern(pattern, name, moment), options)

    def grown(self, child: nn.Module, lineage: Lineage, shelf: Shelf) -> dict[Place, Any]:
        """The child's optimizer's entries, by their places."""
        names: dict[Any, str] = {parameter: name for name, parameter in child.named_parameters()}
        carried, _ = carry_over(self.optimizer, child, lineage, place=lambda value, _: _kept(value, shelf))
        entries: dict[Place, Any] = {}
        keys = {key: value for kept in carried.state.values() for key, value in kept.items()}
        for parameter in (parameter for group in carried.param_groups for parameter in group["params"]):
            # Loaders expect a state of every parameter: zeros are what an optimizer starts a new one with.
            kept = carried.state.get(parameter) or {key: _zeros(value, parameter, shelf) for key, value in keys.items()}
            entries |= {self._state.of(names[parameter], key): value for key, value in kept.items()}
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in carried.param_groups]
        if not isinstance(self._options, _Pattern):
            return {**entries, self._options: groups}
        for group in groups:
            for name in group["params"]:
                entries |= {self._options.of(name, key): value for key, value in group.items() if key != "params"}
        return entries


@dataclass(frozen=True)
class _Pattern:
    """The place of an entry about a parameter: others' have their names in its place, and other keys.

    Attributes:
        path: of the one that is known.
        name: its parameter's.
        key: what it is of the parameter's.
    """

    path: Place
    name: str
    key: str

    def of(self, name: str, key: str = "") -> Place:
        *rest, last = (part.replace(self.name, name) if isinstance(part, str) else part for part in self.path)
        return (*rest, last[: len(last) - len(self.key)] + key)


def _groups(
    checkpoint: _Checkpoint, listed: str, names: Iterable[str]
) -> tuple[list[dict[str, Any]], _Pattern | Place, set[Place]]:
    """Parameter groups, parameters by their names; where they stand, as a list or by parameter; and all those places."""
    if listed in checkpoint.entries:
        place = checkpoint.paths[listed]
        return [dict(group) for group in checkpoint.read(listed)], place, {place}
    within = {key: checkpoint.paths[key] for key in checkpoint.entries if key.startswith(f"{listed}.")}
    numbers = {path[-2] for path in within.values() if len(path) > 1}
    if numbers and all(isinstance(number, int) for number in numbers):
        groups: list[dict[str, Any]] = [{} for _ in range(max(numbers) + 1)]
        for key, path in within.items():
            groups[path[-2]][path[-1]] = checkpoint.read(key)
        return groups, next(iter(within.values()))[:-2], set(within.values())
    groups, pattern = [], None
    for name in names:
        start = f"{listed}.{name}."
        own = {key[len(start) :]: checkpoint.read(key) for key in within if key.startswith(start)}
        for option in own:
            pattern = pattern or _Pattern(within[start + option], name, option)
        known = next((group for group in groups if {**group, "params": None} == {**own, "params": None}), None)
        if known is not None:
            known["params"].append(name)
        elif own:
            groups.append({**own, "params": [name]})
    if pattern is None:
        raise MorphError(f"{checkpoint.path} has an optimizer's state without its parameter groups, {listed}.")
    return groups, pattern, set(within.values())


def _zeros(value: Any, parameter: nn.Parameter, shelf: Shelf) -> Any:
    """The start of a parameter's state, whose value for another parameter is given."""
    if not isinstance(value, Tensor):
        return type(value)()
    if not value.ndim:
        return torch.zeros_like(value)
    like = torch.empty(parameter.shape, dtype=value.dtype, device="meta")
    return shelf.of(like, torch.device("cpu"), lambda: torch.zeros(like.shape, dtype=like.dtype))


def _kept(value: Tensor, shelf: Shelf) -> Tensor:
    return value if isinstance(value, Elsewhere) else shelf.keep(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that it works in one process, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
