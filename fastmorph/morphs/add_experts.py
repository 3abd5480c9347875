"""Experts: a network inside a model becomes a mixture of copies of itself, or a mixture gets more experts.

- A network that maps each position by itself (a transformer's MLP) becomes a `fastmorph.nn.Mixture` of copies behind a router
  of noise. The shares of the experts chosen for a position sum to 1, so that together they compute what one of them computes,
  to the rounding of these shares (Komatsuzaki et al., "Sparse Upcycling", 2023).
- A mixture of n experts, k to a position, gets m n of which m k are chosen: each expert and its row of the router m times.
  Where the shares are a softmax, over all or over those chosen, each copy gets 1 / m of what its expert got. With "pair" the
  copies' last weights are W + R_j with noise R_j that sums to zero, so that they part when they train.
- The model itself, "", where transformers has a class of the same network with experts: see `stock_mixture`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor, nn

from fastmorph.certify.outputs import eval_mode
from fastmorph.equation.randomness import Stream
from fastmorph.errors import MorphError
from fastmorph.graph.find import submodule_of
from fastmorph.graph.structure import follow
from fastmorph.morphs.copies import Copies
from fastmorph.morphs.stock_mixture import put_stock_mixture
from fastmorph.nn import Mixture
from fastmorph.plan.layers import check_surroundings, refusal, unhooked
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction

_COUNTS, _CHOSEN, _NO_COUNTS = re.compile(r"expert"), re.compile(r"top_?k|per_tok"), re.compile(r"group")
_FILLS = ("pair", "duplicate")


@dataclass(frozen=True)
class AddExperts:
    """Make a network a mixture of `experts`, `top_k` to a position, or give a mixture as many, as data (see `add_experts`).

    Attributes:
        layer: dotted name of a network that maps each position by itself, or of a module with a router and experts (a list of
            modules, or stacked in parameters of three dimensions); "" for the model itself, see `stock_mixture`.
        experts: how many there are to be; of a mixture, m times as many as it has.
        top_k: how many of them a position is to have; of a mixture, the same m times as many as now.
        fill: what tells the copies of a mixture's expert apart, which the router always chooses together: "pair", noise that
            cancels in their sum, or "duplicate", nothing, so that they train alike.
    """

    layer: str
    experts: int
    top_k: int = 2
    fill: str = "pair"

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Put the mixture in its place in `transaction.model`.

        Raises MorphError, with the layer, the cause and the remedy, where that would not be exact.
        """
        module = submodule_of(transaction.model, self.layer)
        for name, number in (("experts", self.experts), ("top_k", self.top_k)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise MorphError(f"layer {self.layer!r}: {name}={number!r} must be an int of at least 1.")
        if self.top_k > self.experts:
            raise MorphError(f"layer {self.layer!r}: top_k={self.top_k} are more than the {self.experts} experts.")
        if self.fill not in _FILLS:
            raise MorphError(f"layer {self.layer!r}: fill={self.fill!r} must be 'pair' or 'duplicate'.")
        transaction.settle(module)
        blocks = {} if self.layer else dict(_blocks(module))
        for path, (block, mixture) in blocks.items():
            replace(self, layer=path)._multiply(transaction, block, mixture)
        if blocks:
            _count([*module.modules(), getattr(module, "config", None)], mixture, self.experts // mixture.experts)
        elif not self.layer:
            put_stock_mixture(transaction, self.experts, self.top_k)
        else:
            self._change(transaction, module)

    def _change(self, transaction: Transaction, module: nn.Module) -> None:
        check_surroundings(transaction.model, self.layer, module)
        mixture = _find_mixture(self.layer, module)
        if mixture is None:
            self._divide(transaction, module)
        else:
            self._multiply(transaction, module, mixture)

    @torch.no_grad()
    def _divide(self, transaction: Transaction, module: nn.Module) -> None:
        """Copies of a dense network, and a router."""
        noise = transaction.noise("add_experts", self.layer)
        x = _positions(self.layer, module, noise.of("x"), check=transaction.with_weights)
        near = next(module.parameters())
        router = nn.Linear(x.shape[-1], self.experts, bias=False, device=near.device, dtype=x.dtype)
        if transaction.with_weights:
            noise.of("router").fill(router.weight, x.shape[-1] ** -0.5)
        experts = [deepcopy(unhooked(module)) for _ in range(self.experts)]
        for expert in experts:
            for new, old in zip(expert.parameters(), module.parameters(), strict=True):
                transaction.lineage.copied(new, [old], Copies(1, 1, self.experts), Copies(1, 2, self.experts))
        transaction.replace_module(module, Mixture(router, experts, self.top_k), near=near)

    @torch.no_grad()
    def _multiply(self, transaction: Transaction, module: nn.Module, mixture: _Mixture) -> None:
        """Each expert, and its row of the router, several times."""
        times, rest = divmod(self.experts, mixture.experts)
        if rest or not times or self.top_k != times * mixture.top_k:
            near = max(1, round(self.experts / mixture.experts))
            raise MorphError(
                f"layer {self.layer!r} has {mixture.experts} experts, {mixture.top_k} to a position: {self.experts} with "
                f"{self.top_k} would not share them alike; the nearest that works is experts={near * mixture.experts}, "
                f"top_k={near * mixture.top_k}."
            )
        noise = transaction.noise("add_experts", self.layer)
        x = _sample(mixture.width, noise.of("x"), next(module.parameters()))
        before = _run(self.layer, module, x) if transaction.with_weights else None
        last = mixture.last_weights(self.layer) if self.fill == "pair" else set()
        for name, old in mixture.stacked():
            new = old.detach().expand(times, *old.shape)
            if name in last and transaction.with_weights:
                new = new + _apart(noise.of(name), new, old)
            transaction.replace(old, new.flatten(0, 1), linear=Copies(times, 1), square=Copies(times, 2))
        if isinstance(mixture.holder, nn.ModuleList):
            self._multiply_modules(transaction, mixture.holder, times, last, noise)
        _count(module.modules(), mixture, times)
        if isinstance(mixture.router, nn.Linear):
            mixture.router.out_features *= times
        if before is not None and not torch.allclose(before, _run(self.layer, module, x), rtol=0, atol=_bound(before)):
            raise refusal(
                self.layer,
                "copies of its experts would not add up to them: its shares are no softmax, or an expert is not linear in its "
                "last weight",
                "give fill='duplicate', or add experts to another layer",
            )

    def _multiply_modules(
        self, transaction: Transaction, experts: nn.ModuleList, times: int, last: set[str], noise: Stream
    ) -> None:
        old = list(experts)
        copies = [[expert, *(deepcopy(unhooked(expert)) for _ in range(times - 1))] for expert in old]
        for number, expert in enumerate(old):
            for name, parameter in list(expert.named_parameters()):
                new = parameter.detach().expand(times, *parameter.shape)
                if name in last and transaction.with_weights:
                    new = new + _apart(noise.of(number, name), new, parameter)
                for one, value in zip(copies[number][1:], new[1:], strict=True):
                    copied = one.get_parameter(name)
                    copied.copy_(value)
                    transaction.lineage.copied(copied, [parameter], Copies(1, 1, times), Copies(1, 2, times))
                transaction.replace(parameter, new[0], linear=Copies(1, 1, times), square=Copies(1, 2, times))
        experts.extend(copy for place in range(1, times) for copy in (found[place] for found in copies))


@dataclass(frozen=True, eq=False)
class _Mixture:
    """A router and experts inside of a module.

    Attributes:
        router: the module whose weight has a row for each expert.
        holder: an nn.ModuleList of experts, or the module that stacks their weights along a first dimension.
        experts: how many there are.
        top_k: how many a position has.
        width: of a position.
    """

    router: nn.Module
    holder: nn.Module
    experts: int
    top_k: int
    width: int

    def stacked(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers that have an entry for each expert."""
        for module in (self.router, *([] if isinstance(self.holder, nn.ModuleList) else [self.holder])):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.ndim and len(tensor) == self.experts:
                    yield name, tensor

    def last_weights(self, layer: str) -> set[str]:
        """The names of weights of an expert that make its output."""
        if not isinstance(self.holder, nn.ModuleList):
            return {[name for name, tensor in self.holder.named_parameters(recurse=False) if tensor.ndim == 3][-1]}
        record = follow(self.holder[0], torch.empty(2, self.width, device="meta")).record
        made = {int(atom) for block in record.blocks if "output" in block.cause for atom in block.atoms}
        found = {name for name, atoms in record.outputs.items() if made.intersection(atoms.tolist())}
        if not found:
            raise refusal(layer, "no weight of an expert makes its output", "give fill='duplicate'")
        return found


def _find_mixture(layer: str, module: nn.Module) -> _Mixture | None:
    """The router and the experts in a module; None if it has none. Raises MorphError if they cannot be told."""
    parts = list(module.modules())
    stacks = [part for part in parts if any(p is not None and p.ndim == 3 for p in part._parameters.values())]
    lists = [part for part in parts if isinstance(part, nn.ModuleList) and len({type(expert) for expert in part}) == 1]
    for holder in [*stacks, *lists]:
        inside = set(holder.modules())
        count = len(holder) if isinstance(holder, nn.ModuleList) else next(len(p) for p in holder.parameters() if p.ndim == 3)
        weights = ((part, part._parameters.get("weight")) for part in parts if part not in inside)
        routers = [
            (part, weight) for part, weight in weights if weight is not None and weight.ndim == 2 and len(weight) == count
        ]
        chosen = {value for part in parts for key, value in _numbers(part) if _is_top_k(key)}
        if len(routers) == 1 and len(chosen) == 1:
            return _Mixture(routers[0][0], holder, count, chosen.pop(), routers[0][1].shape[1])
    if stacks or (lists and any(_is_top_k(key) for part in parts for key, _ in _numbers(part))):
        raise refusal(
            layer,
            "it looks like a mixture of experts, but has not one router with a row for each and one number of those chosen",
            "name the module that holds the router and the experts alone",
        )
    return None


def _blocks(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, _Mixture]]]:
    """The modules of a model that hold a router beside stacked experts."""
    for path, module in model.named_modules():
        stacks = (part for part in module.children() if any(p.ndim == 3 for p in part.parameters(recurse=False)))
        chooses = any(_is_top_k(key) for part in module.modules() for key, _ in _numbers(part))
        mixture = _find_mixture(path, module) if chooses and any(stacks) else None
        if mixture is not None:
            yield path, (module, mixture)


def _numbers(part: object) -> list[tuple[str, int]]:
    return [(key, value) for key, value in vars(part).items() if type(value) is int and not key.startswith("_")]


def _is_top_k(key: str) -> bool:
    return bool(_CHOSEN.search(key)) and not _NO_COUNTS.search(key)


def _count(parts: Iterable[object], mixture: _Mixture, times: int) -> None:
    """Let modules, and a config, count so many times as many experts, and choose so many times as many."""
    for part in filter(None, parts):
        for key, value in _numbers(part):
            old = mixture.top_k if _is_top_k(key) else mixture.experts if _COUNTS.search(key) else 0
            if value == old:
                setattr(part, key, times * value)


def _apart(noise: Stream, copies: Tensor, old: Tensor) -> Tensor:
    """Noise that sums to zero over copies, (times, *), of the size of the old entries."""
    drawn = noise.tensor(copies.shape, old, float(old.detach().double().square().mean().sqrt()) / len(copies))
    return drawn - drawn.mean(0)


def _sample(width: int, noise: Stream, like: Tensor) -> Tensor:
    """A batch of two sequences of three positions, on the meta device without values."""
    return like.new_empty(2, 3, width) if like.device.type == "meta" else noise.tensor((2, 3, width), like)


@torch.no_grad()
def _run(layer: str, module: nn.Module, x: Tensor) -> Tensor:
    """What a network makes of positions, in eval mode; of several results the first."""
    try:
        with eval_mode(module):
            out = module(x)
    except Exception as error:  # whatever its forward does with what it does not take
        raise refusal(
            layer,
            f"it does not run on one tensor of positions of size {x.shape[-1]} ({error})",
            "name a network that does, such as the MLP of a transformer, or the module of a router and experts",
        ) from error
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, Tensor):
        raise refusal(
            layer, f"it returns a {type(out).__name__} and no tensor", "name a network that maps a tensor to a tensor"
        )
    return out


def _bound(out: Tensor) -> float:
    """How far rounding may move outputs of this size."""
    return 2**8 * torch.finfo(out.dtype).eps * float(out.abs().max())


def _positions(layer: str, module: nn.Module, noise: Stream, *, check: bool) -> Tensor:
    """Positions of the width that a network takes. Raises MorphError where it takes none, or mixes them."""
    matrix = next((p for p in module.parameters() if p.ndim == 2 and p.is_floating_point()), None)
    if matrix is None or isinstance(module, nn.Embedding):
        raise refusal(
            layer, "it has no matrix that maps positions", "name a network that has, such as the MLP of a transformer"
        )
    failure = None
    for width in dict.fromkeys(
        reversed(matrix.shape)
    ):  # of nn.Linear the last is that of the input, of GPT-2's Conv1D the first
        x = _sample(width, noise, matrix)
        try:
            whole, some = _run(layer, module, x), _run(layer, module, x.flatten(0, 1)[1:3])
        except MorphError as error:
            failure = failure or error
            continue
        alike = whole.shape[:-1] == x.shape[:-1] and some.shape == (2, whole.shape[-1])
        if not alike or (check and not torch.allclose(whole.flatten(0, 1)[1:3], some, rtol=0, atol=_bound(whole))):
            raise refusal(
                layer, "it does not map each position by itself", "name a network that does, such as the MLP of a transformer"
            )
        return x
    assert failure is not None
    raise failure


def add_experts(model: M, layers: Mapping[str, int], *, top_k: int = 2, fill: str = "pair", **options: Unpack[Options]) -> M:
    """Make networks in a model mixtures of experts, or give mixtures more of them, so that the model computes the same.

    Args:
        model: the parent; it is not touched.
        layers: {network or mixture: number of experts}, see `AddExperts`.
        top_k: how many of them a position has.
        fill: see `AddExperts`.
        **options: those of `morph`, see `Options`.

    Returns:
        The child. A network is a `fastmorph.nn.Mixture` in its place, whose router is new; a mixture is of the class it was.

    Raises:
        MorphError: a layer is neither, or cannot be shared out exactly, with the cause and the remedy.
    """
    return grow(model, [AddExperts(layer, experts, top_k, fill) for layer, experts in layers.items()], options)


register_operator(AddExperts, name="add_experts")
