"""A model of transformers grown in one line: what comes back is of the stock class, with the config of the child."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastmorph.certify.run import run
from fastmorph.equation.randomness import Generator
from fastmorph.errors import MorphError
from fastmorph.inputs import as_call
from fastmorph.plan.morph import Morphed, morph
from fastmorph.plan.parents import CannotSave
from fastmorph.transformers.example import example_call
from fastmorph.transformers.recipe import recipe
from fastmorph.transformers.sizes import implied, rewrite, say_heads, say_inner, shapes_of, size_of

M = TypeVar("M", bound=nn.Module)
_IGNORED = frozenset({"training", "dropout", "is_hf_initialized"})


def grow(
    model: M,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    num_hidden_layers: int | None = None,
    vocab_size: int | None = None,
    num_experts: int | None = None,
    fill: str | None = None,
    untie: bool = False,
    optimizer: Optimizer | None = None,
    example_inputs: Any = None,
    generator: Generator = None,
    verify: bool | str = True,
) -> Morphed[M]:
    """Give a model of transformers larger sizes, so that it computes the same.

    Args:
        model: the parent, of any class of transformers; it is not touched.
        hidden_size: width of the stream, in every block; of a model of two towers, that of the one that reads ids. Where code
            divides the width by the number of heads, heads come along in proportion, and inner channels where the config says
            them by a whole `mlp_ratio`.
        intermediate_size: inner channels of every MLP.
        num_attention_heads: query heads, in every block, of the size that they have.
        num_key_value_heads: heads of keys and values.
        num_hidden_layers: blocks; new ones are spread evenly, each behind the one that it is like. Of an encoder and a decoder
            of equally many, both.
        vocab_size: ids; logits of the old ones stay.
        num_experts: experts of a mixture; a dense model becomes one of another class, see `fastmorph.AddExperts`.
        fill: what new channels, heads and blocks begin with: "pair", "zero", or "rotate" for the stream's width; None: "zero"
            for the stream's width, which works wherever any number does, and "pair" for the rest.
        untie: give the head a weight of its own first, where it shares the embedding's.
        optimizer: as in `fastmorph.morph`.
        example_inputs: as in `fastmorph.morph`; None: ids, pixels or features of a small call.
        generator: as in `fastmorph.morph`.
        verify: as in `fastmorph.morph`.

    Returns:
        As `fastmorph.morph`; the model's config has the new sizes, and `save_pretrained` writes what `from_pretrained` loads
        without fastmorph. `history` is the plan, to be printed, saved or run by `fastmorph.morph`.

    Raises:
        MorphError: a size is smaller, unknown or cannot be had, or the stock class does not say with any config what the child
            is, with the cause and the remedy.
    """
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": num_hidden_layers,
        "vocab_size": vocab_size,
        "num_experts": num_experts,
    }
    if not hasattr(model, "config") or not callable(getattr(model, "save_pretrained", None)):
        raise MorphError(f"a {type(model).__name__} is no model of transformers: give one, or make a plan for fastmorph.morph.")
    plan = recipe(model, sizes, fill, untie=untie)
    sizes = implied(model, sizes)
    olds, before = {name: size_of(model, name) for name in sizes}, shapes_of(model)
    call = example_inputs
    if call is None:  # caches hold an entry a head, which cannot be compared with those of fewer
        call = example_call(model, cached=num_attention_heads is None and num_key_value_heads is None and hidden_size is None)
    done = morph(model, plan, example_inputs=call, optimizer=optimizer, generator=generator, verify=verify)
    child: Any = done.model
    say_sizes(child, sizes, olds, before)
    check_stock(child, call, {(olds[name], new) for name, new in sizes.items()})
    return replace(done, model=child)


def say_sizes(
    child: nn.Module,
    sizes: Mapping[str, int | None],
    olds: Mapping[str, int | None],
    before: Mapping[str, tuple[int, ...]],
) -> None:
    """Write grown sizes into configs and modules; `before` has the parent's shapes. Raises MorphError where a config cannot say
    one.
    """
    if any(sizes.get(name) is not None for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")):
        say_heads(child)
    for name, new in sizes.items():
        if name == "num_key_value_heads" and new is None and olds.get(name) == olds.get("num_attention_heads"):
            new = sizes.get("num_attention_heads")
        old = olds.get(name)
        if old is not None and new is not None and name not in ("num_hidden_layers", "vocab_size"):
            rewrite(child, name, old, new, before)
    inner = olds.get("intermediate_size")
    if inner is not None:
        say_inner(child, sizes.get("intermediate_size") or inner)


def check_stock(child: Any, call: Any, grown: Set[tuple[Any, Any]]) -> None:
    """Raise MorphError unless the class makes, with the child's config, a network like the child; then let it be saved.

    Numbers of modules that are a size as it was, where the class sets it as it is, or the other way round, are set as the class
    does, if that computes the same on `call`; None: whoever loads the child compares it.
    """
    kind = type(child).__name__
    try:
        with torch.device("meta"):
            getattr(child.config, "validate", lambda: None)()
            stock = type(child)(child.config)
    except Exception as error:
        told = " ".join(str(error).split())
        raise MorphError(
            f"{kind} cannot be made with the child's config: {told} Grow sizes in proportion where its code ties them."
        ) from error
    shapes, wanted = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (stock, child))
    for name in {**wanted, **shapes}:
        if shapes.get(name) != wanted.get(name):
            raise MorphError(
                f"{kind} cannot load the child by any config: it has {name!r} of shape {shapes.get(name, 'none')}, and the "
                f"child {wanted.get(name, 'none')}; its code ties sizes that were not grown together, so grow these in "
                "proportion, or use fastmorph.morph, whose child is saved by fastmorph.save."
            )
    late = [
        (ours, key, vars(theirs)[key])
        for ours, theirs in zip(child.modules(), stock.modules(), strict=True)
        for key in _differing(ours, theirs)
        if {(vars(ours)[key], vars(theirs)[key]), (vars(theirs)[key], vars(ours)[key])} & grown
    ]
    inputs = as_call(call, child) if late and call is not None else None
    before = {} if inputs is None else run(child, "child", "eval", inputs, torch.float32).outputs
    for ours, key, value in late:
        setattr(ours, key, value)
    after = {} if inputs is None else run(child, "child", "eval", inputs, torch.float32).outputs
    if any(isinstance(leaf, Tensor) and not torch.equal(leaf, after[path]) for path, leaf in before.items()):
        raise MorphError(f"{kind} computes otherwise with the numbers that the class sets, {late[0][1]!r} among them.")
    for (name, ours), (_, theirs) in zip(child.named_modules(), stock.named_modules(), strict=True):
        for key in _differing(ours, theirs):
            raise MorphError(
                f"{kind} cannot load the child by any config: it sets {key!r} of {name!r} to {vars(theirs).get(key)!r}, and "
                f"the child has {vars(ours).get(key)!r}; use fastmorph.morph, whose child is saved by fastmorph.save."
            )
    for module in child.modules():
        if isinstance(vars(module).get("save_pretrained"), CannotSave):
            del module.save_pretrained


def _differing(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Plain attributes that would be others in a model that is loaded."""
    held, made = vars(ours), vars(theirs)
    plain = (key for key in held if not key.startswith("_") and key not in _IGNORED)
    return [key for key in plain if type(held[key]) in (int, float, bool, str) and key in made and made[key] != held[key]]
