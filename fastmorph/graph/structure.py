"""A model's structure, followed once: it may be kept and handed to many calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fastmorph.context import plain_context
from fastmorph.errors import MorphError
from fastmorph.graph.attributes import new_factors, update_attributes
from fastmorph.graph.coupled import Coupled, Tables
from fastmorph.graph.coupling import Coupling
from fastmorph.graph.find import backbone_hint, channels_of, weights_of
from fastmorph.graph.growth import Growth
from fastmorph.graph.guess import traced
from fastmorph.graph.links import Link, is_of_links, links_of
from fastmorph.graph.record import Axis, Record
from fastmorph.graph.skeleton import ForwardError, Skeleton
from fastmorph.graph.tape import Tape
from fastmorph.inputs import Inputs, as_call


class Structure:
    """Which channels of a model belong together, found by one run of it that computes nothing; see `follow`.

    It holds shapes and no weights, so that it takes little memory, and it stays what it is when the model is changed:
    whoever is given both compares them first (`check`).
    """

    def __init__(self, skeleton: Skeleton, record: Record, inputs: Inputs, known: dict[str, Any]) -> None:
        self.skeleton, self.record, self.inputs = skeleton, record, inputs
        self._known = known  # the model's fingerprint
        self._couplings: dict[frozenset[str], Coupling] = {}

    def coupling(self, wider: frozenset[str]) -> Coupling:
        """The classes of channels where the groups counted by these attributes get wider."""
        if wider not in self._couplings:
            self._couplings[wider] = Coupling(self.record, wider)
        return self._couplings[wider]

    def channels(self, layer: str) -> Tensor:
        """The atoms of the channels that a layer, or a weight, makes, in order; see `channels_of`."""
        return channels_of(self.skeleton.model, self.record, layer, self._weights)

    def owners(self, names: Iterable[str]) -> frozenset[str]:
        """The modules that hold these parameters and buffers, under all their names."""
        return frozenset(alias.rpartition(".")[0] for name in names for alias in self.skeleton.names[name])

    def grown(self, growth: Growth) -> Structure:
        """The structure of the resized model, followed anew.

        Raises ForwardError and MorphError where that model does not run.
        """
        skeleton = self.skeleton.copy()
        for name in growth.names:
            skeleton.resize(name, growth.shape(name, [axis.size for axis in self.record.parameter(name)]))
        try:
            update_attributes(skeleton.model, growth)
        except RuntimeError as error:  # of a hook that computes a weight, on tensors that do not fit each other
            cause = f"the weights that its hooks compute do not fit the grown ones ({error}); bake those, then it may"
            raise ForwardError("", cause) from error
        skeleton.values.update(new_factors(skeleton.values, growth))
        known = fingerprint(skeleton.model)
        beside = {(axis.name, axis.dim): layout.copy > 0 for axis, layout in growth.beside.items()}
        record = skeleton.trace(
            self.inputs, runs=self.record.runs, whole=self.record.whole, taped=bool(growth.way), untaped=beside
        )
        return Structure(skeleton, record, self.inputs, known)

    @cached_property
    def tapes(self) -> list[Tape]:
        """What the model does, operator by operator, in every run in eval mode."""
        return self.record.tapes or self.skeleton.trace(self.inputs, runs=self.record.runs, taped=True).tapes

    @cached_property
    def masked(self) -> Structure | None:
        """The same model followed with masks as well (`Skeleton.with_masks`); None where that finds nothing."""
        record = self.skeleton.with_masks(self.record)
        return None if record is self.record else Structure(self.skeleton, record, self.inputs, self._known)

    def followed_by(self, whole: Mapping[tuple[str, int], int]) -> Structure:
        """The same model followed anew, with neighbours as one channel: see `Record.whole`."""
        record = self.skeleton.trace(self.inputs, runs=self.record.runs, whole=whole)
        return Structure(self.skeleton, record, self.inputs, self._known)

    def check(self, model: nn.Module) -> None:
        """Raise MorphError if this is not the structure of `model` as it stands."""
        known, found = self._known, fingerprint(model)
        for name in [*known, *found]:
            if known.get(name) != found.get(name):
                raise MorphError(
                    f"the structure given is not this model's: {_named(name)} is another since it was followed, or another "
                    "model's; follow the model anew with fm.follow(model, example_inputs)."
                )

    def untouched(self, growth: Growth) -> str | None:
        """A parameter that no run used, and that has as many indices as something that grows, so that it may have to follow."""
        sizes = {axis.size for axis in growth.layouts}
        heads = () if growth.way else growth.repeats  # which are of no meaning outside of attention
        near = tuple(f"{module}." for module in heads) or ("",)
        return next((axis.name for axis in self._untouched if axis.size in sizes and axis.name.startswith(near)), None)

    @cached_property
    def _untouched(self) -> list[Axis]:
        unused = {name for name, _ in self.skeleton.model.named_parameters()} - self.record.used
        return [axis for name in sorted(unused) for axis in self.record.parameter(name) if axis.size > 1]

    def is_sure(self, growth: Growth) -> bool:
        """Whether the resized model is known to do what this one does, without a run; see `fastmorph.graph.links`."""
        return is_of_links(growth, self.links)

    @cached_property
    def links(self) -> list[Link]:
        """What is known to grow without a run."""
        return links_of(self.skeleton, self.record)

    @cached_property
    def _weights(self) -> dict[int, str]:
        return weights_of(self.skeleton.model, self.record)

    @cached_property
    def _tables(self) -> Tables:
        return Tables(self.coupling(frozenset({"groups"})))

    def coupled(self, layer: str) -> Coupled:
        """The tensors that share the output channels of a layer; see `fastmorph.graph.coupled`."""
        return self._tables.of({layer: self.channels(layer)})[layer]

    def groups(self) -> dict[str, Coupled]:
        """The tensors that share a layer's output channels, for every weight that makes channels, by its name."""
        return self._tables.of(self.record.outputs)


def _named(name: str) -> str:
    return f"module {name!r}" if name else "the model itself"


def fingerprint(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a structure depends on, by module: classes, plain attributes, names and shapes of tensors."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors = [*module._parameters.items(), *module._buffers.items()]
        # One tuple: what is kept for long is what a garbage collection looks through.
        shapes = (part for key, tensor in tensors if tensor is not None for part in (key, tensor.shape, tensor.dtype))
        plain = (part for key, value in vars(module).items() if _is_plain(key, value) for part in (key, value))
        found[name] = (type(module), *shapes, None, *plain)
    return found


def _is_plain(key: str, value: Any) -> bool:
    if key.startswith("_") or key in ("training", "dropout", "use_nested_tensor"):
        return False
    return type(value) in (int, str, bool) or (type(value) is tuple and all(type(item) is int for item in value))


@plain_context()
def follow(model: nn.Module, example_inputs: Any = None, *, taped: bool = False) -> Structure:
    """Follow a model's channels once, to hand what was found to many calls (`structure=` of `coupled`, `widen`, `morph`).

    Args:
        model: the model; it is not touched, and may be changed or let go afterwards.
        example_inputs: one call's arguments, as `morph` takes them; None: guessed from the first layer. They are not kept:
            only their shapes and dtypes matter.
        taped: whether to note what the model does, operator by operator, for growth of a stream, which else follows it again.

    Raises:
        MorphError: the model does not run on them, or its forward cannot be followed.
    """
    try:
        skeleton, known = Skeleton(model), fingerprint(model)
        inputs, record = traced(skeleton, None if example_inputs is None else as_call(example_inputs, model), taped=taped)
    except MorphError as error:
        if not (hint := backbone_hint(model)):
            raise
        raise MorphError(f"{error}{hint}") from error
    return Structure(skeleton, record, skeleton.inputs(inputs), known)


def coupled(model: nn.Module, layer: str, example_inputs: Any = None, structure: Structure | None = None) -> Coupled:
    """The tensors that share the output channels of a layer: what `widen` would change.

    Args:
        model: the model; it is not touched.
        layer: dotted name of a layer with a weight, or of the weight itself.
        example_inputs: one call's arguments, as `morph` takes them; None: guessed from the first layer.
        structure: what `follow` found in the model, instead of following it again.

    Raises:
        MorphError: the layer makes no channels, the model does not run, or the structure is not its.
    """
    if structure is None:
        structure = follow(model, example_inputs)
    else:
        structure.check(model)
    return structure.coupled(layer)
