"""The child in the making: its modules, and the tensors that operators put into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.errors import MorphError
from fastmorph.plan.layers import replace_module
from fastmorph.plan.lineage import Lineage, Map
from fastmorph.plan.memory import check_memory
from fastmorph.plan.step import Step


@dataclass(eq=False)
class Tensors:
    """A model whose tensors and modules are replaced wherever it has them.

    Attributes:
        model: the child in the making; operators change it in place, and reassign it (`replace_module` does) where the layer is
            the model itself.
        lineage: where its parameters come from.
        with_weights: False where the architecture alone is wanted (`restructure`): nothing is solved, and tensors need only
            the right shapes, dtypes and devices. The model may then stand on the meta device.
        consume: whether the parent's tensors may go: see `release`.
    """

    model: nn.Module
    lineage: Lineage
    with_weights: bool = True
    consume: bool = False
    _step: Step | None = field(default=None, init=False)
    _places: dict[int, list[tuple[dict[str, Any], str]]] = field(default_factory=dict, init=False)

    def keep(self, value: nn.Parameter) -> nn.Parameter:
        """What is to stand in the model for a new parameter: itself, unless its values are to be elsewhere."""
        return value

    @property
    def late(self) -> bool:
        """Whether `compute` computes when the values are read."""
        return False

    def compute(self, like: Tensor, shape: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, of this shape and of the dtype and device of `like`; where values are elsewhere, maybe later."""
        return make()

    def fill(self, module: nn.Module, value: Tensor, name: str = "weight") -> None:
        """Set a new module's parameter, so far on the meta device, to `value`, of its shape or one that reshapes to it.

        Nothing is set in a model without weights.
        """
        old = module._parameters[name]
        assert old is not None
        if not self.with_weights:
            return
        value = value.detach().reshape(old.shape)
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)  # part of a batch, which it would keep alive
        module._parameters[name] = new = self.keep(nn.Parameter(value, requires_grad=old.requires_grad))
        self.lineage.replaced(old, new, None, None)

    @torch.no_grad()
    def replace(self, old: Tensor, new: Tensor, *, linear: Map | None, square: Map | None) -> Tensor:
        """Put `new` wherever the model has the parameter or buffer `old`, tied places included, and let `old` go.

        Returns what stands there now.

        Args:
            old: a registered parameter or buffer.
            new: its values, any shape; they take `old`'s dtype and device. A parameter stays one, and keeps requires_grad.
            linear: the map from a first moment (momentum, average of gradients) of `old` to that of `new`; None: it starts
                afresh. Of no meaning for buffers.
            square: the same for second moments.
        """
        value = new.detach().to(old)
        if isinstance(old, nn.Parameter):
            value = self.keep(nn.Parameter(value, requires_grad=old.requires_grad))
            value.__dict__.update(old.__dict__)  # attributes by which training code marks parameters
        places = self._places_of(old)
        for tensors, name in places:
            tensors[name] = value
        self._places[id(value)] = places
        if not places:
            raise MorphError(f"the model has no parameter or buffer of shape {tuple(old.shape)} that is the given one.")
        if isinstance(old, nn.Parameter) and isinstance(value, nn.Parameter):
            self.lineage.replaced(old, value, linear, square)
        self.release(old)
        return value

    def forget_places(self) -> None:
        """Look anew for where tensors are: modules may have changed by other ways than these."""
        self._places.clear()

    def _places_of(self, tensor: Tensor) -> list[tuple[dict[str, Any], str]]:
        """The registers of modules that hold a tensor, and its names in them."""
        places = [place for place in self._places.pop(id(tensor), []) if place[0].get(place[1]) is tensor]
        if places:
            return places
        self.forget_places()
        for module in self.model.modules():
            registered: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in registered:
                for name, held in tensors.items():
                    self._places.setdefault(id(held), []).append((tensors, name))
        return self._places.pop(id(tensor), [])

    def replace_module(self, old: nn.Module, new: nn.Module, near: nn.Parameter) -> None:
        """Put `new` wherever the model has `old`, with its hooks and mode.

        Parameters of `new` that the model did not have join the optimizer's parameter group of `near`, one that it had.
        Those of `old` that it has no more are released.

        Raises MorphError where the new parameters fit into no memory.
        """
        gone = set(old.parameters())
        size = sum(parameter.nbytes for parameter in new.parameters() if parameter not in gone)
        check_memory(f"layer {self._step.layer!r}: the {type(new).__name__} for it" if self._step else "", size, near.device)
        self.model = replace_module(self.model, old, new)
        for parameter in new.parameters():
            self.lineage.joined(parameter, near)
        if self.consume:
            for parameter in gone.difference(self.model.parameters()):
                self.release(parameter)

    def release(self, old: Tensor) -> None:
        """Free a tensor that the child has no more, where the parent is consumed: whoever still holds it finds it empty."""
        if self.consume:
            old.grad = None
            old.data = old.data.new_empty(0)
