"""What is known about one tensor of a traced run: which channel each of its positions belongs to.

Every index of every dimension of a parameter or buffer is an *atom*, an integer. A tensor carries *slots*: int64 label tensors
of its own number of dimensions, of size 1 along dimensions where the label does not change, that say which atom each position
belongs to. A convolution's output has one slot, along its channels; a weight has one slot a dimension. Operators that only
move data move the labels in the same way, so that views, transpositions, slices and shuffles need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

FIXED = -1  # a position with data that belong to no channel, e.g. to the model's input
FREE = -2  # a position with one constant for all, e.g. padded zeros: whatever stands beside it may grow


@dataclass(frozen=True, eq=False, slots=True)
class Flow:
    """What is known about a tensor.

    Attributes:
        slots: the labels; a slot of one element belongs to a dimension of size 1, or to data repeated along a dimension.
        opaque: whether it holds data, that may differ from position to position along dimensions without labels.
        linear: whether it is a linear function of one parameter, so that columns that cancel still cancel in it.
    """

    slots: tuple[Tensor, ...] = ()
    opaque: bool = True
    linear: bool = False

    def along(self, dim: int) -> list[Tensor]:
        """The slots that change along a dimension."""
        return [slot for slot in self.slots if slot.shape[dim] > 1]

    @property
    def varying(self) -> list[Tensor]:
        """The slots of more than one element."""
        return [slot for slot in self.slots if slot.numel() > 1]

    @property
    def uniform(self) -> list[Tensor]:
        """The slots of one element."""
        return [slot for slot in self.slots if slot.numel() == 1]

    def map(self, move: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Flow:
        """The flow of a tensor that an operator moved: the same operator on the labels, each at its full `shape`."""
        return replace(self, slots=tuple(compress(move(slot.expand(tuple(shape)))) for slot in self.slots))


UNIFORM = Flow(opaque=False)  # one constant everywhere
DATA = Flow()  # no labels, any data


def compress(label: Tensor) -> Tensor:
    """Size 1 along every dimension where the label does not change."""
    for dim, stride in enumerate(label.stride()):
        if stride == 0 and label.shape[dim] > 1:  # without a look at what is expanded
            label = label.narrow(dim, 0, 1)
    values = label.numpy()
    for dim, size in enumerate(label.shape):
        if size > 1 and _is_same_along(values, dim):
            label = label.narrow(dim, 0, 1)
            values = label.numpy()
    return label


def _is_same_along(values: Any, dim: int) -> bool:
    first = values[(slice(None),) * dim + (slice(0, 1),)]
    corner = (0,) * values.ndim
    if values.size and values[corner] != values[(*corner[:dim], -1, *corner[dim + 1 :])]:  # most do, and it is quickly seen
        return False
    return bool((values == first).all())


def varying_dims(label: Tensor) -> set[int]:
    """The dimensions along which a label changes."""
    return {dim for dim, size in enumerate(label.shape) if size > 1}


def is_real(label: Tensor) -> bool:
    """Whether every position belongs to an atom."""
    values = label.numpy()
    return not values.size or bool(values.min() >= 0)


def aligned(label: Tensor, ndim: int) -> Tensor:
    """With dimensions of size 1 in front, as broadcasting has it."""
    return label.reshape((1,) * (ndim - label.ndim) + tuple(label.shape))


def only_along(label: Tensor, dim: int, size: int) -> Tensor | None:
    """The label as a vector along `dim`, (size,); None if it changes along another dimension too."""
    if label.numel() != label.shape[dim]:
        return None
    return label.reshape(-1).expand(size)


def line(label: Tensor, dim: int) -> Tensor:
    """The labels along one dimension, where all others are at their first index."""
    return label[tuple(slice(None) if other == dim else 0 for other in range(label.ndim))]


def leaf(labels: Sequence[Tensor], *, linear: bool) -> Flow:
    """The flow of a parameter (`linear`) or buffer: a slot for each dimension, with the atoms of its indices."""
    slots = [label.view([-1 if other == dim else 1 for other in range(len(labels))]) for dim, label in enumerate(labels)]
    return Flow(tuple(slots), opaque=False, linear=linear)
