"""Depth in blocks: a residual block like its neighbour, that adds nothing to the stream at birth.

Which weights write the stream, and which rows inside of the block make the channels that they read, is found by following the
model (see `fastmorph.graph.residual` and `fastmorph.graph.twins`). The new block is a copy of its neighbour, in which

- pair: the channels that each writer reads come in twins, whose rows are those of the first of them, and whose columns are the
  neighbour's W and -W: nothing is zero but the biases of the writers, and training parts the twins;
- zero: the writers are zero (LLaMA-Pro: Wu et al., 2024).

Behind a norm (a BatchNorm, Gemma's sandwich norms) the gain is zero in both: a norm would divide the rounding of W - W by the
root of its eps.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from fastmorph.certify.readings import InsertedLayer, read
from fastmorph.elsewhere import values_of
from fastmorph.errors import MorphError
from fastmorph.graph.clone import clone
from fastmorph.graph.dataflow import Dataflow, record, story
from fastmorph.graph.residual import Block, Stuck, ends, find_writers
from fastmorph.graph.skeleton import ForwardError
from fastmorph.graph.trail import bare_skeleton, guess_call
from fastmorph.graph.twins import find_twins, rows_of
from fastmorph.inputs import Inputs
from fastmorph.morphs.layer_numbers import recount, renumber
from fastmorph.plan.memory import check_memory
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction

_FILLS = ("pair", "zero")
_PLAIN = (int, float, str, bool, type(None), type)


@dataclass(frozen=True)
class InsertBlock:
    """Put a residual block behind the one called `after`, as data (the arguments of `insert_block`).

    The blocks stand in an nn.ModuleList or nn.Sequential; those behind get the next number, in plans too: 3 becomes 4, unit3
    unit4. Where names in an nn.Sequential do not count, the new one gets a 2 behind the name of the block before it.
    """

    from_last: ClassVar[bool] = True
    after: str
    fill: str = "pair"

    @property
    def target(self) -> str:
        """The block before the new one."""
        return self.after

    def apply(self, transaction: Transaction) -> None:
        """Insert the block in `transaction.model`; see `apply_together`."""
        self.apply_together([self], transaction)

    @staticmethod
    def apply_together(operators: Sequence[InsertBlock], transaction: Transaction) -> None:
        """Insert blocks one after the other: the model is followed once before, and once after.

        Raises MorphError if that cannot be exact, with the block, the cause and the remedy.
        """
        began = perf_counter()
        depths = _Depths(transaction, [operator.after for operator in operators])
        share = 1e3 * (perf_counter() - began) / len(operators)
        for operator in operators:
            with transaction.step(operator) as step:
                step.milliseconds += share
                depths.insert(operator)
        depths.check()
        transaction.structure = None


@dataclass(frozen=True)
class _Edit:
    """New entries along a dimension of a tensor: (index, of which, factor)."""

    dim: int
    entries: tuple[tuple[int, int, float], ...]

    def __call__(self, tensor: Tensor) -> None:
        """Set them, in place."""
        to, of = (torch.tensor([entry[side] for entry in self.entries], device=tensor.device) for side in (0, 1))
        factors = torch.tensor([entry[2] for entry in self.entries], dtype=tensor.dtype, device=tensor.device)
        shape = [-1 if dim == self.dim else 1 for dim in range(tensor.ndim)]
        tensor.index_copy_(self.dim, to, tensor.index_select(self.dim, of) * factors.view(shape))


@dataclass(frozen=True)
class _Level:
    """All entries of a tensor at one value."""

    value: float

    def __call__(self, tensor: Tensor) -> None:
        """Set them, in place."""
        tensor.fill_(self.value)


Edits = dict[str, list[_Edit | _Level]]  # by name inside of the block


class _Depths:
    """A model whose lists of blocks grow."""

    def __init__(self, transaction: Transaction, targets: Sequence[str]) -> None:
        self._transaction, model = transaction, transaction.model
        call = transaction.call or guess_call(model)
        if call is None:
            raise MorphError(
                f"block {targets[0]!r}: the model must be followed to see what a block adds; pass example_inputs=."
            )
        self._call: Inputs = call
        modules = dict(model.named_modules(remove_duplicate=False))
        lists = dict.fromkeys(target.rpartition(".")[0] for target in targets)
        self._original = {
            block: f"{name}.{key}" if name else key
            for name in lists
            for key, block in (modules[name]._modules.items() if name in modules else ())
            if block is not None
        }
        skeleton = bare_skeleton(model)
        self._names = {id(tensor): name for tensor, name in _first_names(model).items()}
        self._flow = self._record(skeleton)
        self._found: dict[str, Block | str] = {}
        self._new: list[tuple[nn.Module, nn.Module, Block]] = []  # new block, the one before it, and what its template does

    def _record(self, skeleton: Any) -> Dataflow:
        try:
            return record(skeleton, self._call, self._original.values())
        except ForwardError as error:
            raise MorphError(f"the model does not run on the example inputs: {error}.") from error

    # --- inserting ------------------------------------------------------------------------------------------------------------

    def insert(self, operator: InsertBlock) -> None:
        """Insert one block."""
        if operator.fill not in _FILLS:
            raise MorphError(f"block {operator.after!r}: fill={operator.fill!r} must be one of {', '.join(map(repr, _FILLS))}.")
        transaction, model = self._transaction, self._transaction.model
        name, blocks, place = self._locate(operator.after)
        old = list(blocks)
        template, block = self._template(operator.after, old, place)
        at = old.index(template)
        edits = self._edits(operator, self._original[template], block)
        transaction.settle(template)
        new = self._copy(operator.after, template, edits)
        before, after = [*blocks._modules], _names([*blocks._modules], place)
        blocks._modules.clear()
        for key, member in zip(after, [*old[: place + 1], new, *old[place + 1 :]], strict=True):
            blocks._modules[key] = member
        self._original[new] = self._original[template]
        self._new.append((new, old[place], block))
        renumber(old, list(blocks))
        recount(model, name, len(old), place + 1, at)
        transaction.readings.append(InsertedLayer(name, place + 1, tuple(before), tuple(after)))

    def _locate(self, after: str) -> tuple[str, Any, int]:
        """The list that a block stands in, its name, and the block's place there."""
        model = self._transaction.model
        modules = dict(model.named_modules(remove_duplicate=False))
        if after not in modules:
            near = difflib.get_close_matches(after, modules, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}" if near else ""
            raise MorphError(f"the model has no block {after!r}{hint} (see model.named_modules()).")
        name, _, key = after.rpartition(".")
        blocks = modules[name]
        if not after or not isinstance(blocks, nn.ModuleList | nn.Sequential):
            kind = type(blocks).__name__
            raise _refusal(
                after, f"it stands in a {kind}, and not in an nn.ModuleList or nn.Sequential", "name a block that does"
            )
        return name, blocks, [*blocks._modules].index(key)

    def _template(self, after: str, blocks: list[nn.Module], place: int) -> tuple[nn.Module, Block]:
        """The neighbour to copy: of the block and the one behind it the one with fewer parameters that is residual."""
        neighbours = sorted(blocks[place : place + 2], key=lambda block: len(list(block.parameters())))
        causes: dict[nn.Module, str] = {}
        for block in neighbours:
            found = self._look(block)
            if isinstance(found, str):
                causes[block] = found
            elif (
                found.ends and ends(self._flow, self._flow.visits[self._original[blocks[place]]][0].outputs[0])[0] != found.ends
            ):
                causes[block] = f"what it returns comes out of {found.ends[0][0]}, and what it is given does not"
            else:
                return block, found
        cause = causes.get(blocks[place]) or next(iter(causes.values()))
        raise _refusal(after, cause, "widen or deepen the layers in it, or insert behind a block that adds to a stream")

    def _look(self, block: nn.Module) -> Block | str:
        """What a block does, or why none like it can be inserted, a clause."""
        name = self._original[block]
        if name not in self._found:
            self._found[name] = self._seen(block, name)
        return self._found[name]

    def _seen(self, block: nn.Module, name: str) -> Block | str:
        model = self._transaction.model
        times = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        if times[id(block)] > 1:
            return "it is shared: it stands in several places of the model"
        own = {id(parameter) for parameter in block.parameters()}
        inside = set(block.modules())
        for other, module in model.named_modules():
            for key, parameter in module._parameters.items() if module not in inside else ():
                if id(parameter) in own:
                    return f"it shares a weight with {f'{other}.{key}'!r}, which a copy would not"
        visits = self._flow.visits.get(name, [])
        if len(visits) != 1:
            return f"the model calls it {len(visits)} times on these inputs, and not once"
        try:
            return find_writers(self._flow, name)
        except Stuck as stuck:
            return str(stuck)

    def _edits(self, operator: InsertBlock, name: str, block: Block) -> Edits:
        """What is another in the new block than in its template."""
        found: Edits = {}
        given = {value.key for value in self._flow.visits[name][0].inputs}
        twins = []
        for writer in block.writers:
            if not writer.name.startswith(f"{name}."):
                raise _refusal(
                    operator.after, f"{writer.name!r}, outside of it, writes what it adds", "insert behind another block"
                )
            inside = writer.name.removeprefix(f"{name}.")
            if writer.kind != "matrix":
                found[inside] = [_Level(-writer.offset)]
            elif operator.fill == "zero":
                found[inside] = [_Level(0.0)]
            else:
                try:
                    twins.append(find_twins(self._flow, writer, given))
                except Stuck as stuck:
                    raise _refusal(operator.after, f"its channels cannot be made twins: {stuck}", "use fill='zero'") from None
        for each in twins:
            found.setdefault(each.name.removeprefix(f"{name}."), []).append(_Edit(each.dim, tuple(each.columns)))
        for row, pairs in rows_of(twins).items():
            if not row.name.startswith(f"{name}."):
                raise _refusal(
                    operator.after,
                    f"its channels cannot be made twins: {row.name!r}, outside of it, tells them apart",
                    "use fill='zero'",
                )
            found.setdefault(row.name.removeprefix(f"{name}."), []).append(
                _Edit(row.dim, tuple((to, of, 1.0) for to, of in pairs))
            )
        return found

    def _copy(self, after: str, template: nn.Module, edits: Edits) -> nn.Module:
        """The template with other weights, and what it shares with the rest of the model shared."""
        transaction, inside = self._transaction, set(template.modules())
        sizes = [tensor.nbytes for tensor in (*template.parameters(), *template.buffers())]
        device = next((tensor.device for tensor in template.parameters()), None)
        check_memory(f"block {after!r}: a block like it", sum(sizes), device)
        held = {id(value) for module in transaction.model.modules() if module not in inside for value in vars(module).values()}
        memo: dict[int, Any] = {
            id(value): value
            for part in inside
            for value in vars(part).values()
            if id(value) in held and not isinstance(value, (*_PLAIN, nn.Module, Tensor))
        }
        for name, tensor in _named(template):
            memo[id(tensor)] = self._tensor(tensor, edits.get(name, ()))
        new = clone(template, memo)
        for copied, own in zip(new.parameters(), template.parameters(), strict=True):
            transaction.lineage.joined(copied, own)
        return new

    @torch.no_grad()
    def _tensor(self, tensor: Tensor, edits: Sequence[_Edit | _Level]) -> Tensor:
        def edited() -> Tensor:
            value = values_of(tensor).clone()
            for edit in edits:
                edit(value)
            return value

        made = self._transaction.with_weights
        value = self._transaction.compute(tensor, tensor.shape, edited) if made else torch.empty_like(tensor)
        if not isinstance(tensor, nn.Parameter):
            return value
        parameter = nn.Parameter(value, requires_grad=tensor.requires_grad)
        vars(parameter).update(vars(tensor))
        return self._transaction.keep(parameter) if made else parameter

    # --- what the model then does ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise MorphError unless the model does what it did, the new blocks taken out."""
        transaction, model = self._transaction, self._transaction.model
        names = {module: name for name, module in model.named_modules()}
        first, remedy = names[self._new[0][0]], "insert behind a block of a list that the model's code runs through as it is"
        self._original = {module: names[module] for module in self._original}
        try:
            flow = self._record(bare_skeleton(model))
        except MorphError as error:
            raise _refusal(first, f"the model does not run with it ({error})", remedy) from error
        without = {}
        for new, before, block in self._new:
            name, visits = names[new], flow.visits.get(names[new], [])
            if len(visits) != 1:
                raise _refusal(name, f"the model's code calls the new block {len(visits)} times, and not once", remedy)
            without[name] = stream = visits[0].inputs[block.stream]
            if block.ends and stream.key != flow.visits[names[before]][0].outputs[0].key:
                raise _refusal(name, f"what it is given is not what {names[before]!r} returns", remedy)
        rename = {name: self._names.get(id(tensor), name) for tensor, name in _first_names(model).items()}
        (before_told, before_results), (told, results) = story(self._flow, {}, {}), story(flow, rename, without)
        results = read(transaction.readings, before_results, results)
        for old, now in zip(before_told, told, strict=False):
            if old != now:
                raise _refusal(first, f"the code around the new block computes {now[0]} of other things than before", remedy)
        if len(told) != len(before_told) or any(results.get(path, ref) != ref for path, ref in before_results.items()):
            raise _refusal(first, "the code around the new block does or returns something else than before", remedy)


def _names(names: list[str], place: int) -> list[str]:
    """Names with one more behind a place: the next number, and so those behind that count on; or the same and a number."""
    name = names[place]
    stem = name.rstrip("0123456789")
    digits, found = name[len(stem) :], names[: place + 1]
    numbered = [f"{stem}{int(digits) + step:0{len(digits)}d}" for step in range(1, len(names) - place + 1)] if digits else []
    counted = next((at for at, (one, two) in enumerate(zip(numbered, names[place + 1 :], strict=False)) if one != two), None)
    run = len(numbered) - 1 if counted is None else counted  # how many behind it count on
    rest = names[place + 1 + run :]
    if digits and numbered[run] not in (*found, *rest):
        return [*found, *numbered[: run + 1], *rest]
    number = next(number for number in itertools.count(2) if f"{name}_{number}" not in names)
    return [*found, f"{name}_{number}", *names[place + 1 :]]


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _first_names(model: nn.Module) -> dict[Tensor, str]:
    return {tensor: name for name, tensor in _named(model)}


def _refusal(name: str, cause: str, remedy: str) -> MorphError:
    return MorphError(f"no block can be inserted behind {name!r}: {cause}; {remedy}.")


def insert_block(model: M, after: str, *, fill: str = "pair", **options: Unpack[Options]) -> M:
    """Put a residual block behind another, like it, which adds nothing at birth, so that the network computes the same.

    Args:
        model: the parent; it is not touched.
        after: dotted name of a block, in an nn.ModuleList or nn.Sequential, numbered or named, that returns what it is given
            plus something.
        fill: "pair", dense, or "zero"; see `fastmorph.morphs.insert_block`.
        **options: those of `morph`, see `Options`; the model is followed on `example_inputs`, guessed where there are none.

    Returns:
        The child. Blocks behind the new one have the next number; so have their places for caches (`layer_idx`), and the
        config counts one layer more.

    Raises:
        MorphError: the block is not residual (post-norm blocks are not), is shared or shares weights, or the code around it
            does not run through the list, with the cause and the remedy.
    """
    return grow(model, [InsertBlock(after, fill)], options)


register_operator(InsertBlock, name="insert_block")
