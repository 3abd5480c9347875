"""The memory of Anderson acceleration (Walker and Ni 2011), as registered operators and validated functions.

Each item of a batch holds m <= 32 differences of its successive images and moves, in any order: a new one takes the place
of the oldest, a slot, and nothing is copied. Slots not yet used hold zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .support import interprets

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
    out: Tensor = _gram_op(moves, move, _sums("anderson_gram", moves, accumulate))
    return out


def anderson_push(
    images: Tensor,
    moves: Tensor,
    slot: Tensor,
    image: Tensor,
    last_image: Tensor,
    move: Tensor,
    last_move: Tensor,
    *,
    accumulate: torch.dtype | None = None,
) -> Tensor:
    """Write the newest differences into a slot of both memories, and return `anderson_gram(moves, move)` from the same pass.

        images[b, slot[b]] = image[b] - last_image[b]      moves[b, slot[b]] = move[b] - last_move[b]

    Args:
        images, moves: (B, m, N), changed in place; any strides, but no two places of them in one place of memory.
        slot: (B,) int64; an item whose slot is not in 0 .. m - 1 keeps its memory as it is.
        image, last_image, move, last_move: (B, N), of the dtype and on the device of the memories.
        accumulate: as in `anderson_gram`.

    Returns:
        (B, m, m + 1), as `anderson_gram` has it.

    Raises:
        TypeError, ValueError: as `anderson_gram`; ValueError too if `images` and `moves` are one tensor.
    """
    _check("anderson_push", moves, image=image, last_image=last_image, move=move, last_move=last_move)
    _check("anderson_push", images)
    if images is moves or images.shape != moves.shape or (images.dtype, images.device) != (moves.dtype, moves.device):
        raise ValueError("anderson_push needs two memories of one shape, dtype and device, and two tensors: give each its own.")
    if slot.dtype != torch.int64 or slot.shape != moves.shape[:1] or slot.device != moves.device:
        raise ValueError(
            f"anderson_push needs a slot for each of {moves.shape[0]} items, int64 on {moves.device}, but has {slot}."
        )
    out: Tensor = _push_op(images, moves, slot, image, last_image, move, last_move, _sums("anderson_push", moves, accumulate))
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
    out, _ = _checked_update(image, images, share, 0)
    return out


def anderson_update_with_squares(image: Tensor, images: Tensor, share: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """`anderson_update`, and from the same pass the squared norms of its rows, those of (B, channels, N / channels).

    Returns:
        (B, N), contiguous, and (B, channels).

    Raises:
        TypeError, ValueError: as `anderson_update`; ValueError too if N is not a multiple of `channels`, which are at least 1.
    """
    if channels < 1 or image.shape[-1] % channels:
        raise ValueError(
            f"anderson_update cannot see image, of shape {tuple(image.shape)}, as {channels} rows of equal length."
        )
    return _checked_update(image, images, share, channels)


def _checked_update(image: Tensor, images: Tensor, share: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    _check("anderson_update", images, image=image)
    if share.dtype != images.dtype:
        raise TypeError(f"anderson_update needs a share of dtype {images.dtype}, but it has {share.dtype}: convert with .to().")
    if share.shape != images.shape[:2] or share.device != images.device:
        raise ValueError(
            f"anderson_update needs a share for each of the differences {tuple(images.shape[:2])} on {images.device}, but it "
            f"has shape {tuple(share.shape)} on {share.device}."
        )
    out, squares = _update_op(image, images, share, channels)
    return out, squares


@torch.library.custom_op("fastmorph_kernels::anderson_gram", mutates_args=(), device_types="cuda")
def _gram_op(moves: Tensor, move: Tensor, accumulate: torch.dtype) -> Tensor:
    with torch.cuda.device(moves.device):  # Triton launches on the current device, wherever its arguments are
        return _launch_gram(moves, move, accumulate)


@_gram_op.register_kernel("cpu")
def _gram_cpu(moves: Tensor, move: Tensor, accumulate: torch.dtype) -> Tensor:
    return _launch_gram(moves, move, accumulate) if interprets(moves.dtype) else _gram_torch(moves, move, accumulate)


@_gram_op.register_fake
def _gram_fake(moves: Tensor, move: Tensor, accumulate: torch.dtype) -> Tensor:
    return _gram_out(moves, accumulate)


@torch.library.custom_op("fastmorph_kernels::anderson_push", mutates_args=("images", "moves"), device_types="cuda")
def _push_op(
    images: Tensor,
    moves: Tensor,
    slot: Tensor,
    image: Tensor,
    last_image: Tensor,
    move: Tensor,
    last_move: Tensor,
    accumulate: torch.dtype,
) -> Tensor:
    with torch.cuda.device(moves.device):
        return _launch_gram(moves, move, accumulate, (images, slot, image, last_image, last_move))


@_push_op.register_kernel("cpu")
def _push_cpu(
    images: Tensor,
    moves: Tensor,
    slot: Tensor,
    image: Tensor,
    last_image: Tensor,
    move: Tensor,
    last_move: Tensor,
    accumulate: torch.dtype,
) -> Tensor:
    if interprets(moves.dtype):
        return _launch_gram(moves, move, accumulate, (images, slot, image, last_image, last_move))
    items = ((slot >= 0) & (slot < moves.shape[1])).nonzero().flatten()
    images[items, slot[items]] = (image - last_image)[items]
    moves[items, slot[items]] = (move - last_move)[items]
    return _gram_torch(moves, move, accumulate)


@_push_op.register_fake
def _push_fake(
    images: Tensor,
    moves: Tensor,
    slot: Tensor,
    image: Tensor,
    last_image: Tensor,
    move: Tensor,
    last_move: Tensor,
    accumulate: torch.dtype,
) -> Tensor:
    return _gram_out(moves, accumulate)


def _gram_out(moves: Tensor, accumulate: torch.dtype) -> Tensor:
    batch, memory, _ = moves.shape
    return moves.new_empty((batch, memory, memory + 1), dtype=accumulate)


def _gram_torch(moves: Tensor, move: Tensor, accumulate: torch.dtype) -> Tensor:
    moves = moves.to(accumulate)
    return moves @ torch.cat([moves, move.to(accumulate)[:, None]], 1).mT


def _launch_gram(
    moves: Tensor, move: Tensor, accumulate: torch.dtype, newest: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    out = _gram_out(moves, accumulate)
    if moves.numel() == 0:  # an empty grid is an error; sums of nothing are zero
        return out.zero_()
    from .anderson_kernel import config_for, launch_gram, launch_total, stretches_of

    config = config_for("gram", moves)
    partial = out.new_empty((out.shape[0], stretches_of(moves, config), *out.shape[1:]))
    images, slot, image, last_image, last_move = newest or (moves, move[:, 0], move, move, move)
    tensors = (images, moves, image, move, last_image, last_move, slot)
    launch_gram(*tensors, partial, push=newest is not None, config=config)
    launch_total(partial, out)
    return out


@torch.library.custom_op("fastmorph_kernels::anderson_update", mutates_args=(), device_types="cuda")
def _update_op(image: Tensor, images: Tensor, share: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(image.device):
        return _launch_update(image, images, share, channels)


@_update_op.register_kernel("cpu")
def _update_cpu(image: Tensor, images: Tensor, share: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    if interprets(image.dtype):
        return _launch_update(image, images, share, channels)
    out, squares = _update_out(image, channels)
    out.copy_(image - (images.mT @ share[:, :, None])[:, :, 0])
    if channels:
        squares.copy_(out.view(*squares.shape, out.shape[1] // channels).square().sum(2))
    return out, squares


@_update_op.register_fake
def _update_fake(image: Tensor, images: Tensor, share: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    return _update_out(image, channels)


def _update_out(image: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape), image.new_empty((image.shape[0], channels))


def _launch_update(image: Tensor, images: Tensor, share: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    out, squares = _update_out(image, channels)
    if out.numel() == 0:
        return out, squares.zero_()
    from .anderson_kernel import config_for, launch_update

    launch_update(image, images, share, out, squares if channels else None, config=config_for("update", image))
    return out, squares


def _sums(operator: str, moves: Tensor, accumulate: torch.dtype | None) -> torch.dtype:
    if accumulate not in (None, torch.float64, moves.dtype):
        raise TypeError(f"{operator} adds up {moves.dtype} in {moves.dtype} or float64, but accumulate is {accumulate}.")
    return accumulate or moves.dtype


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
