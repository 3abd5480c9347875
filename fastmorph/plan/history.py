"""What made a child: it knows the plans by itself, through copies and further growths."""

from __future__ import annotations

from torch import nn

from fastmorph.errors import MorphError
from fastmorph.plan.plan import Plan

_KEY = "_fastmorph_history"  # texts, so that a copied or pickled child does not need this library
_UNWRITTEN = "# "


def history(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that made a model out of its first parent, in order; none for one that was never grown.

    `morph` and `restructure` note them on the child, each as `Morphed.history` has it. `fastmorph.save` stores them.

    Raises MorphError where one of them cannot be written, because of an activation that has no name.
    """
    texts: tuple[str, ...] = vars(model).get(_KEY, ())
    for text in texts:
        if text.startswith(_UNWRITTEN):
            raise MorphError(text.removeprefix(_UNWRITTEN))
    return tuple(map(Plan.from_toml, texts))


def remember(child: nn.Module, parent: nn.Module, plan: Plan) -> None:
    """Note on the child what made it: what made its parent, and this plan."""
    try:
        text = plan.to_toml()
    except MorphError as error:
        text = f"{_UNWRITTEN}the history of this model cannot be told: {error}"
    vars(child)[_KEY] = (*vars(parent).get(_KEY, ()), text)
