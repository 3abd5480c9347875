"""One growth: a network, a plan, and what became of it; and the smallest growth that ends the same way."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import fastmorph as fm
from tests.fuzz.grammar import Network, network
from tests.fuzz.judge import bound, difference, fingerprint, other_modes, outputs
from tests.fuzz.plans import CONTEXTS, Circumstances, circumstances, plan

GOOD = ("ok", "refused")
KINDS = (*GOOD, "wrong", "raw", "parent changed", "cannot run", "replay differs", "restructure differs", "optimizer")
FRESH = [(2, 7, True), (3, 7, False), (1, 9, True), (4, 5, False), (2, 12, True)]  # batch size, map size, optional inputs


@dataclass(frozen=True)
class Outcome:
    """What became of a growth: one of `KINDS`, its cause for counting, and details; with all that is needed to repeat it."""

    seed: int
    kind: str
    cause: str = ""
    detail: str = ""
    source: str = ""
    operators: str = ""
    pieces: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    milliseconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.kind in GOOD

    def script(self) -> str:
        """At most twelve lines that repeat it."""
        lines = [line.strip() for line in self.source.splitlines()[3:]]
        cut = next(i for i, line in enumerate(lines) if line.startswith("def forward"))
        return "\n".join(
            [
                f"# {self.kind}: {self.cause}: {self.detail}"[:240].replace("\n", " "),
                "# __init__: " + "; ".join(lines[:cut]),
                f"# {lines[cut]} " + "; ".join(lines[cut + 1 :]),
                f"# plan: {self.operators}",
                "from tests.fuzz.growths import run",
                "",
                f"print(run({self.seed}, pieces={self.pieces}, steps={self.steps}))",
            ]
        )


class _Found(Exception):
    """The growth ends here."""

    def __init__(self, kind: str, cause: str, detail: str = "") -> None:
        super().__init__(kind)
        self.outcome = (kind, cause, detail)


def run(seed: int, pieces: Collection[int] | None = None, steps: Collection[int] | None = None) -> Outcome:
    """The growth of a seed, with the pieces and operators of those numbers alone (all if None)."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = network(seed, pieces)
        parent = net.build()
        operators = plan(seed, parent, net.mode, steps)
        how = circumstances(seed)
        if how.context == "channels last":
            _channels_last(parent)
        try:
            _grow(seed, net, parent, operators, how)
            found = ("ok", "", "")
        except _Found as end:
            found = end.outcome
    told = f"{operators}, in {net.mode} mode, {str(net.dtype)[6:]}, {how}"
    kept = [None if chosen is None else tuple(chosen) for chosen in (pieces, steps)]
    return Outcome(seed, *found, net.text, told, *kept, 1e3 * (time.perf_counter() - began))


def shrink(outcome: Outcome) -> Outcome:
    """The smallest growth found, by leaving out pieces and operators, that ends in the same kind with the same cause."""
    best = replace(outcome, pieces=tuple(range(1, 8)), steps=tuple(range(4)))
    for attribute in ("steps", "pieces"):
        for number in getattr(best, attribute):
            fewer = tuple(n for n in getattr(best, attribute) if n != number)
            chosen = {"pieces": best.pieces, "steps": best.steps, attribute: fewer}
            found = run(outcome.seed, **chosen)
            if (found.kind, found.cause) == (outcome.kind, outcome.cause):
                best = found
    return best


def _grow(seed: int, net: Network, parent: nn.Module, operators: list[Any], how: Circumstances) -> None:
    if not operators:
        raise _Found("ok", "nothing to grow")
    fresh = _runs(net, parent)
    options: dict[str, Any] = {"verify": how.verify}
    if how.inputs:
        args, keywords = net.call(seed + 1, 2, 7, how.options)
        options["example_inputs"] = keywords or args
    optimizer = None if how.consume else _optimizer(net, parent, how.optimizer)
    before, given = fingerprint(parent), net.build() if how.consume else parent
    generator = torch.Generator().manual_seed(seed)
    try:
        with CONTEXTS[how.context]():
            if how.followed:
                options["structure"] = fm.follow(given, options.get("example_inputs"))
            morphed = fm.morph(given, operators, optimizer=optimizer, generator=generator, consume=how.consume, **options)
    except fm.MorphError as error:
        _unchanged(before, parent)
        raise _Found("refused", family(str(error)), str(error)) from None
    except Exception as error:
        raise _Found("raw", f"{type(error).__name__}: {family(str(error))}", repr(error)) from error
    _unchanged(before, parent)
    _compare(net, parent, morphed.model, fresh, wider=bool(morphed.readings))
    if how.replay and not how.consume:
        _replay(parent, morphed, options, fresh)
    if optimizer is not None:
        _trains(net, parent, morphed, before)


def _channels_last(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def _runs(net: Network, parent: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Fresh calls that the parent takes, with what it says."""
    found = []
    for seed, (batch, size, options) in enumerate(FRESH):
        call = net.call(1000 + seed, batch, size, options)
        try:
            found.append((call, outputs(parent, call)))
        except Exception:  # what a network may be given is its own affair
            continue
    return found


def _compare(net: Network, parent: nn.Module, child: nn.Module, fresh: list[Any], *, wider: bool) -> None:
    """`wider`: whether it is told that some outputs are as wide as a stream that grew: those are not compared."""
    if told := other_modes(parent, child):
        raise _Found("wrong", "mode", told)
    for call, before in fresh:
        try:
            after = outputs(child, call)
        except Exception as error:
            raise _Found("cannot run", f"{type(error).__name__}: {family(str(error))}", repr(error)) from error
        grown = {path for path in before if wider and _shape(before[path]) != _shape(after.get(path))}
        apart, where = difference(*({path: leaves[path] for path in leaves if path not in grown} for leaves in (before, after)))
        if apart > 1e-9 and apart > bound(parent, call, net.grain, net.dtype, before):
            raise _Found("wrong", "value" if apart < float("inf") else "shape", f"{apart:.1e} {where}")


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None


def _replay(parent: nn.Module, morphed: fm.Morphed, options: dict[str, Any], fresh: list[Any]) -> None:
    given = {key: value for key, value in options.items() if key == "example_inputs"}
    try:
        again = fm.morph(parent, fm.Plan.from_toml(morphed.history.to_toml()), **options).model.state_dict()
    except Exception as error:
        raise _Found("replay differs", type(error).__name__, str(error)) from error
    state = morphed.model.state_dict()
    if again.keys() != state.keys() or not all(torch.equal(value, again[key]) for key, value in state.items()):
        raise _Found("replay differs", "other bits")
    try:
        bare = fm.restructure(parent, morphed.history, **given)
        bare.load_state_dict(state)
        same = all(difference(outputs(morphed.model, call), outputs(bare, call))[0] == 0 for call, _ in fresh)
    except Exception as error:
        raise _Found("restructure differs", type(error).__name__, str(error)) from error
    if not same:
        raise _Found("restructure differs", "other outputs")


def _optimizer(net: Network, parent: nn.Module, name: str | None) -> torch.optim.Optimizer | None:
    """One that has taken a step; None for a network that cannot be trained."""
    parameters = list(parent.parameters())
    if name is None or not parameters:
        return None
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, lr=1e-12)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return optimizer


def _trains(net: Network, parent: nn.Module, morphed: fm.Morphed, before: dict[str, Any]) -> None:
    assert morphed.optimizer is not None
    held = [p for group in morphed.optimizer.param_groups for p in group["params"]]
    if {id(p) for p in held} != {id(p) for p in morphed.model.parameters()} or len(held) != len(set(map(id, held))):
        raise _Found("optimizer", "it holds other parameters than the child's")
    for parameter in held:
        parameter.grad = torch.ones_like(parameter)
    try:
        morphed.optimizer.step()
    except Exception as error:
        raise _Found("optimizer", type(error).__name__, str(error)) from error
    _unchanged(before, parent)


def _unchanged(before: dict[str, Any], parent: nn.Module) -> None:
    after = fingerprint(parent)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        raise _Found("parent changed", re.sub(r"^.*?[: ](?=\w+$)", "", changed[0]), ", ".join(changed))


def family(message: str) -> str:
    """A message without its names and numbers, for counting: up to the remedy or a hundred characters."""
    told = message.strip().split("\n")  # a certificate ends with its verdict
    text = (f"certificate: {told[-1]}" if len(told) > 1 else told[0]).split("; ")[0]
    text = re.sub(r"(?<!\w)('[^']*'|\"[^\"]*\")", "_", text)
    text = re.sub(r"[\[(][-\d, ().]*[\])]|-?\d+(\.\d+)?(e-?\d+)?", "N", text)
    return text.replace("|", "/")[:110]
