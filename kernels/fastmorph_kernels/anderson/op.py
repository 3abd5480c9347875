"""The memory of Anderson acceleration (Walker and Ni 2011), as registered operators and validated functions.

Each item of a batch holds m <= 32 differences of its successive images and moves, in any order: a new one takes the place
of the oldest, a slot, and nothing is copied. Slots not yet used hold zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..register import register

MOST = 32
"""Differences in a memory, at most."""

_DTYPES = (torch.float32, torch.float64)


def anderson_gram(moves: Tensor, move: Tensor, *, accumulate: torch.dtype | None = None) -> Tensor:
    """Inner products of the differences with each other and with the last move: the normal equations of the shares.

    Their condition is that of the differences squared: `accumulate` is there for float32 tensors that need float64.

    Args:
        moves: (B, m, N), float32 or float64; any strides.
        move: (B, N), of its dtype and on its device.
        accumulate: the dtype of products, sums and result: None, that of the tensors, or float64.

    Returns:
        (B, m, m + 1): in [:, :, :m] the products among `moves`, in [:, :, m] those with `move`. Equal, bit by bit,
        whatever the batch.

    Raises:
        TypeError: a dtype is not supported, or they differ.
        ValueError: shapes or devices do not fit, or there are more than `MOST` differences.
    """
    _check("anderson_gram", moves, move=move)
    if accumulate not in (None, torch.float64, moves.dtype):
        raise TypeError(f"anderson_gram adds up {moves.dtype} in {moves.dtype} or float64, but accumulate is {accumulate}.")
    out: Tensor = _gram_op(moves, move, accumulate or moves.dtype)
    return out


def anderson_update(image: Tensor, images: Tensor, share: Tensor) -> Tensor:
    """The combination of images, image - sum over i of share[:, i] * images[:, i], in one pass.

    Args:
        image: (B, N), float32 or float64.
        images: (B, m, N), of its dtype and on its device; any strides.
        share: (B, m), likewise.

    Returns:
        (B, N), contiguous.

    Raises:
        TypeError: a dtype is not supported, or they differ.
        ValueError: shapes or devices do not fit, or there are more than `MOST` differences.
    """
    _check("anderson_update", images, image=image)
    if share.dtype != images.dtype:
        raise TypeError(f"anderson_update needs a share of dtype {images.dtype}, but it has {share.dtype}: convert with .to().")
    if share.shape != images.shape[:2] or share.device != images.device:
        raise ValueError(
            f"anderson_update needs a share for each of the differences {tuple(images.shape[:2])} on {images.device}, but it "
            f"has shape {tuple(share.shape)} on {share.device}."
        )
    out: Tensor = _update_op(image, images, share)
    return out


def _allocate_gram(moves: Tensor, move: Tensor, accumulate: torch.dtype) -> Tensor:
    batch, memory, _ = moves.shape
    return moves.new_empty((batch, memory, memory + 1), dtype=accumulate)


def _launch_gram(out: Tensor, moves: Tensor, move: Tensor, accumulate: torch.dtype) -> None:
    if moves.numel() == 0:  # an empty grid is an error; sums of nothing are zero
        out.zero_()
        return
    from .kernel import config_for, launch_gram, launch_total, stretches_of

    config = config_for("gram", moves)
    partial = out.new_empty((out.shape[0], stretches_of(moves, config), *out.shape[1:]))
    launch_gram(moves, move, partial, config=config)
    launch_total(partial, out)


def _plain_gram(out: Tensor, moves: Tensor, move: Tensor, accumulate: torch.dtype) -> None:
    out.copy_(moves.double() @ torch.cat([moves, move[:, None]], 1).double().mT)


def _allocate_update(image: Tensor, images: Tensor, share: Tensor) -> Tensor:
    return image.new_empty(image.shape)


def _launch_update(out: Tensor, image: Tensor, images: Tensor, share: Tensor) -> None:
    if out.numel() == 0:
        return
    from .kernel import config_for, launch_update

    launch_update(image, images, share, out, config=config_for("update", image))


def _plain_update(out: Tensor, image: Tensor, images: Tensor, share: Tensor) -> None:
    out.copy_(image - (images.double().mT @ share.double()[:, :, None])[:, :, 0])


def _check(operator: str, memory: Tensor, **vectors: Tensor) -> None:
    """A memory (B, m, N) of at most MOST differences, and vectors (B, N), all of one dtype and device."""
    if memory.dtype not in _DTYPES or any(vector.dtype != memory.dtype for vector in vectors.values()):
        have = ", ".join(str(tensor.dtype) for tensor in (memory, *vectors.values()))
        raise TypeError(f"{operator} needs tensors of one dtype, float32 or float64, but has {have}: convert with .to().")
    if memory.ndim != 3 or memory.shape[1] > MOST:
        raise ValueError(
            f"{operator} needs a memory (B, m, N) of at most {MOST} differences, but has shape {tuple(memory.shape)}."
        )
    for name, vector in vectors.items():
        if vector.shape != (memory.shape[0], memory.shape[2]) or vector.device != memory.device:
            raise ValueError(
                f"{operator} needs {name} (B, N) for a memory {tuple(memory.shape)} on {memory.device}, but it has shape "
                f"{tuple(vector.shape)} on {vector.device}."
            )


_gram_op = register("anderson_gram", allocate=_allocate_gram, launch=_launch_gram, plain=_plain_gram)
_update_op = register("anderson_update", allocate=_allocate_update, launch=_launch_update, plain=_plain_update)
