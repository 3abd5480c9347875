"""Moves of the entries of many weights as a registered operator, and the validated function in front of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..register import register
from ..support import accumulator

Index = Tensor | None
Scale = Tensor | None

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Integers are only copied, bit by bit, as floats of their size.
_COPIED_AS = {torch.int64: torch.float64, torch.int32: torch.float32, torch.int16: torch.float16}
_LARGEST = 2**30  # entries of one output channel, which a kernel counts in 32 bits


def move(
    sources: Sequence[Tensor], indices: Sequence[tuple[Index, Index, Index]], scales: Sequence[tuple[Scale, Scale]]
) -> list[Tensor]:
    """Gather and scale the entries of many weights, in one launch for all of one dtype and device.

        out[o, i, t] = source[index_o[o], index_i[i], index_t[t]] * scale_o[o] * scale_i[i]      0 where an index is -1

    A new layer whose channels repeat old ones, or a kernel with zeros around it, is a case of this. Products are taken in
    float32, those of float64 tensors in float64, and rounded once. Not differentiable; not for CUDA graphs, which would
    replay the table of the first call.

    Args:
        sources: (O, I, T) each, any strides; float64, float32, bfloat16, float16, int64, int32 or int16.
        indices: for each source index_o (O'), index_i (I') and index_t (T'), int64, on the CPU (they are checked there, and
            none of them makes the host wait); None stands for every entry in order.
        scales: for each source scale_o (O') and scale_i (I'), floats on the source's device; None stands for ones.

    Returns:
        (O', I', T') each, contiguous, of the source's dtype and on its device.

    Raises:
        TypeError: a dtype is not supported, or integers are to be scaled.
        ValueError: the lists differ in length, shapes or devices do not fit, or one output channel has 2^30 entries or more.
        IndexError: an index is below -1 or not below its source's size.
    """
    if not len(sources) == len(indices) == len(scales):
        raise ValueError(
            "move needs indices and scales for each source, but there are "
            f"{len(sources)} sources, {len(indices)} indices and {len(scales)} scales."
        )
    for k, (source, index, scale) in enumerate(zip(sources, indices, scales, strict=True)):
        _check(k, source, index, scale)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, source in enumerate(sources):
        groups.setdefault((source.dtype, source.device), []).append(k)
    out: dict[int, Tensor] = {}
    for members in groups.values():
        flat_indices = [index for k in members for index in indices[k]]
        flat_scales = [scale for k in members for scale in scales[k]]
        found = _move_op([sources[k] for k in members], flat_indices, flat_scales)
        out.update(zip(members, found, strict=True))
    return [out[k] for k in range(len(sources))]


def _check(k: int, source: Tensor, index: tuple[Index, Index, Index], scale: tuple[Scale, Scale]) -> None:
    if source.dtype not in _FLOATS and source.dtype not in _COPIED_AS:
        raise TypeError(
            f"move cannot take source {k}, of {source.dtype}: its dtype must be a float or integer of 2 to 8 bytes."
        )
    if source.ndim != 3:
        raise ValueError(f"move needs sources (O, I, T), but source {k} has shape {tuple(source.shape)}: view it as one.")
    for name, given in zip("oit", index, strict=True):
        if given is not None and (given.ndim != 1 or given.dtype != torch.int64 or given.device.type != "cpu"):
            raise ValueError(
                f"move needs index_{name} of source {k} as one dimension of int64 on the CPU, but it has shape "
                f"{tuple(given.shape)}, {given.dtype}, on {given.device}: use .long().cpu()."
            )
    size = _sizes(source, index)
    for name, length, factor in zip("oi", size, scale, strict=False):
        if factor is not None and not (source.dtype in _FLOATS and factor.dtype in _FLOATS):
            raise TypeError(f"move scales floats by floats, but source {k} has {source.dtype} and its scale {factor.dtype}.")
        if factor is not None and (factor.shape != (length,) or factor.device != source.device):
            raise ValueError(
                f"move needs scale_{name} of source {k} with {length} entries on {source.device}, but it has shape "
                f"{tuple(factor.shape)} on {factor.device}."
            )
    if size[1] * size[2] >= _LARGEST:
        raise ValueError(
            f"move would make {size[1] * size[2]} entries for each output channel of source {k}: 2^30 are too many."
        )


def _sizes(source: Tensor, index: Sequence[Index]) -> list[int]:
    """O', I' and T'."""
    return [source.shape[d] if given is None else given.shape[0] for d, given in enumerate(index)]


def _allocate(sources: Sequence[Tensor], indices: Sequence[Tensor | None], scales: Sequence[Tensor | None]) -> list[Tensor]:
    """Three indices and two scales for each source, all sources of one dtype and device."""
    return [source.new_empty(_sizes(source, indices[3 * k : 3 * k + 3])) for k, source in enumerate(sources)]


def _check_indices(sources: Sequence[Tensor], indices: Sequence[Index]) -> None:
    for place, index in enumerate(indices):
        size = sources[place // 3].shape[place % 3]
        if index is not None and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < size:
            raise IndexError(
                f"index_{'oit'[place % 3]} of source {place // 3} runs from {int(index.min())} to {int(index.max())}, but must "
                f"stay between -1 and {size - 1}."
            )


def _move_torch(source: Tensor, indices: Sequence[Index], scales: Sequence[Scale]) -> Tensor:
    value, absent = source, torch.zeros((), dtype=torch.bool)
    for d, index in enumerate(indices):
        if index is not None:
            if source.shape[d] == 0:  # there is nothing to select, and every index is -1
                value = value.new_zeros(*value.shape[:d], 1, *value.shape[d + 1 :])
            value = value.index_select(d, index.clamp_min(0))
            absent = absent | (index < 0).view(-1, *(1,) * (2 - d))
    for d, scale in enumerate(scales):
        if scale is not None:
            value = value.to(accumulator(source.dtype)) * scale.to(accumulator(source.dtype)).view(-1, *(1,) * (2 - d))
    return value.masked_fill(absent, 0)


def _plain(out: list[Tensor], sources: Sequence[Tensor], indices: Sequence[Index], scales: Sequence[Scale]) -> None:
    _check_indices(sources, indices)
    for k, source in enumerate(sources):
        out[k].copy_(_move_torch(source, indices[3 * k : 3 * k + 3], scales[2 * k : 2 * k + 2]))


def _launch(out: list[Tensor], sources: Sequence[Tensor], indices: Sequence[Index], scales: Sequence[Scale]) -> None:
    _check_indices(sources, indices)
    kept = [k for k, tensor in enumerate(out) if tensor.numel()]
    if not kept:  # an empty grid is an error
        return
    from .kernel import COLUMNS, config_for, launch_move

    dtype = sources[0].dtype
    like = sources[0].view(_COPIED_AS.get(dtype, dtype))
    config = config_for(like)
    rows: list[list[int]] = []
    parts: list[Tensor] = []  # the indices, after the rows
    factors: list[Tensor] = []
    tiles, end, scale_end = 0, COLUMNS * len(kept), 0
    for k in kept:
        begins = []
        for index in indices[3 * k : 3 * k + 3]:
            begins.append(-1 if index is None else end)
            if index is not None:
                parts.append(index)
                end += index.numel()
        for scale in scales[2 * k : 2 * k + 2]:
            begins.append(-1 if scale is None else scale_end)
            if scale is not None:
                factors.append(scale.to(accumulator(dtype)))
                scale_end += scale.numel()
        addresses = [sources[k].data_ptr(), out[k].data_ptr()]
        rows.append([*addresses, tiles, *out[k].shape, *sources[k].stride(), *begins])
        tiles += math.ceil(out[k].numel() / config.block)
    table = torch.cat([torch.tensor(rows, dtype=torch.int64).flatten(), *parts])
    if like.is_cuda:
        table = table.pin_memory().to(like.device, non_blocking=True)  # a copy that the host does not wait for
    launch_move(like, table, torch.cat(factors) if factors else None, rows=len(kept), tiles=tiles, config=config)


_move_op = register("move", allocate=_allocate, launch=_launch, plain=_plain)
