"""Operators: morphs as data, and the names by which plan files know them.

An operator from outside the library is a frozen dataclass that meets `Operator`. Once registered, it works wherever the
library's own do: in `morph` and `restructure`, in plan files, in histories.

    @dataclass(frozen=True)
    class Rescale:
        maker: str
        reader: str
        factor: float  # more than 0: a ReLU between the two lets it pass

        @property
        def target(self) -> str:
            return self.maker

        def apply(self, transaction: fm.Transaction) -> None:
            maker, reader = (transaction.find_layer(name).module for name in (self.maker, self.reader))
            up, down = (partial(torch.mul, other=factor) for factor in (self.factor, 1 / self.factor))
            for tensor, by, back in ((maker.weight, up, down), (maker.bias, up, down), (reader.weight, down, up)):
                transaction.replace(tensor, by(tensor), linear=back, square=lambda moment, back=back: back(back(moment)))

    fm.register_operator(Rescale, name="rescale")

Its fields are what a plan file holds: integers, finite floats, texts, booleans, None, tuples of them, and parts (frozen
dataclasses of such fields) that `register_part` knows. The class checks them, and raises MorphError with the layer, the cause
and the remedy.

`apply` changes `transaction.model`, in place, into one that computes the same, and the transaction offers

- model: the child in the making; noise(*names): a `Stream` of noise for a purpose, the same for the same seed and plan.
- example_inputs: the call that was given, or None; call: what to follow the model on, by `fm.follow`, or None; structure: what
  that found, or None.
- find_layer(name): a layer that can be morphed, its weights there to be read, or a refusal.
- settle(module): let the weights that a module waits for be solved, before they are read; without a module, all of them.
- replace(old, new, linear=, square=): a parameter or buffer by other values, with the maps of its optimizer's moments.
- replace_module(old, new, near=): a module by another; new parameters join the optimizer's group of the parameter `near`.
- solve(problem, assign, layer=, modules=): an equation, solved with those of the whole plan; `assign` gets the answer. The new
  modules stand on the meta device until then, and `fill(module, value)` sets a weight there.
- resolve(operator): the same operator with its defaults decided, for the history, so that a later default changes no replay.
- norms: a list to which an inserted BatchNorm is added, so that `calibrate=` batches set its statistics.

In `restructure`, `transaction.with_weights` is False and the model may be on the meta device: the same calls are made, nothing
is solved, and shapes, dtypes and devices alone count. A field called channels, hidden_channels, kernel_size or kernel_sizes
is refused where it asks for more memory than there is. A class whose neighbours in a plan are better run at once may have a
static `apply_together(operators, transaction)`, which runs each inside `transaction.step(operator)`.
"""

from __future__ import annotations

from dataclasses import is_dataclass

from fastmorph.errors import MorphError
from fastmorph.plan.transaction import Operator


class Names:
    """Frozen dataclasses by name: of operators, or of the parts that they are made of; `key` has the name in a table."""

    def __init__(self, role: str, key: str) -> None:
        self.role, self.key = role, key
        self.classes: dict[str, type] = {}

    def register(self, cls: type, name: str) -> None:
        """Raises MorphError if `cls` is no frozen dataclass, or it or the name is taken; to repeat a registration is fine."""
        if not isinstance(cls, type) or not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise MorphError(f"{cls!r} cannot be {self.role}: it must be a class decorated with @dataclass(frozen=True).")
        if not isinstance(name, str) or not name:
            raise MorphError(f"name={name!r} of {cls.__name__} must be a text, by which plan files call it.")
        if self.key in cls.__dataclass_fields__:
            raise MorphError(
                f"{cls.__name__} cannot be {self.role}: in plan files {self.key!r} is its name; rename that field."
            )
        for known_name, known in self.classes.items():
            if (known_name == name) != (known is cls):
                raise MorphError(
                    f"{cls.__module__}.{cls.__name__} cannot be called {name!r}: {known.__module__}.{known.__name__} is called "
                    f"{known_name!r}; each class has one name of its own."
                )
        self.classes[name] = cls

    def name_of(self, cls: type) -> str | None:
        """The name of a class; None if it has none."""
        return next((name for name, known in self.classes.items() if known is cls), None)


OPERATORS = Names("an operator", "operator")
PARTS = Names("a part of an operator", "kind")


def register_operator(cls: type[Operator], *, name: str) -> None:
    """Let plans hold operators of a class, and plan files call them by `name`; see `fastmorph.plan.operators`.

    Raises MorphError if `cls` does not meet `Operator` or is no frozen dataclass, or if it or the name is taken.
    """
    if not _is_operator(cls):
        raise MorphError(f"{cls!r} cannot be an operator: it lacks target or apply; see fastmorph.plan.operators.")
    OPERATORS.register(cls, name)


def register_part(cls: type, *, name: str) -> None:
    """Let fields of operators hold instances of a frozen dataclass, in plan files a table with `kind = "name"`.

    Raises MorphError as `register_operator` does.
    """
    PARTS.register(cls, name)


def check_operator(operator: object) -> None:
    """Raise MorphError, with the remedy, for what is not an instance of a registered class."""
    if OPERATORS.name_of(type(operator)) is not None:
        return
    name = (operator if isinstance(operator, type) else type(operator)).__name__
    if isinstance(operator, type):
        raise MorphError(f"{name} is not a morph but a class; a plan holds its instances, {name}(...).")
    if _is_operator(type(operator)):
        raise MorphError(f"{name} is not registered; call fastmorph.register_operator({name}, name=...) where it is defined.")
    known = ", ".join(sorted(cls.__name__ for cls in OPERATORS.classes.values()))
    raise MorphError(f"{operator!r} is not a morph; a plan holds {known}.")


def _is_operator(cls: type) -> bool:
    return all(hasattr(cls, name) or name in getattr(cls, "__dataclass_fields__", ()) for name in ("target", "apply"))
