"""On the host: which tiles a product is cut into, and how its inputs lie in memory when the kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .configs import lookup

# Sizes and strides that are multiples of this let Triton load 128 bits at once.
_ALIGNED = 16


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch settings; block sizes are powers of two, `block_k` at least 16."""

    block_m: int  # output channels
    block_n: int  # pairs of input channel and offset
    block_k: int  # hidden channels
    num_warps: int
    num_stages: int
    pack: int  # inputs: 0 as they are; 1 copied so that hidden channels lie side by side in memory; 2 so that the others do

    def blocks(self, columns: int) -> tuple[int, int]:
        """BLOCK_I and BLOCK_U for so many input channels: where they are few, a tile holds several offsets."""
        block_i = self.block_n
        while block_i >= 2 * columns and block_i > 1:
            block_i //= 2
        return block_i, self.block_n // block_i


def choose(
    kernel: str,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    rows: int,
    columns: int,
    offsets: int,
    *,
    aligned: bool = True,
) -> TileConfig:
    """The configuration for so many output and input channels, and offsets over the whole batch.

    The largest tiles of which none is half empty, and which are twice as many as the device has multiprocessors: a tile in
    the middle of the frame takes as much time as several near its border, which must be spread evenly. A kernel that
    writes its tiles many times has none to spare for the addresses of a large one, unless the output is aligned.
    """
    kind = "_tensor" if dtype == torch.float32 and precision != "ieee" else ""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    for size, least in (("large", wanted), ("medium", 1)):
        config = TileConfig(**lookup(kernel, dtype, size + kind, device))
        tiles = offsets * -(-rows // config.block_m) * -(-columns // config.block_n)
        if 2 * rows > config.block_m and 2 * columns > config.block_n and tiles >= least and (aligned or size != "large"):
            return config
    return TileConfig(**lookup(kernel, dtype, "small", device))


def packed(kernel: Tensor, hidden: int, pack: int) -> Tensor:
    """An input (B, O, I, *K) as `TileConfig.pack` has it; `hidden` is the dimension, 1 or 2, that products sum over.

    A copy has its taps first in memory, and zeros that round both channel counts up to a multiple of 16. It is memory of
    the inputs' size, and time quadratic in the channels, against products that are cubic: without it, the taps lie
    between neighbouring channels, so that loads are 32 bits wide at best, and 16-bit ones are not pipelined at all.
    """
    if not pack:
        return kernel
    inner = hidden if pack == 1 else 3 - hidden
    strides = [stride for dim, stride in enumerate(kernel.stride()) if dim != inner]
    if kernel.stride(inner) == 1 and not any(n % _ALIGNED for n in [*kernel.shape[1:3], *strides]):
        return kernel
    rounded = [-(-n // _ALIGNED) * _ALIGNED for n in kernel.shape[1:3]]
    new = kernel.new_empty if rounded == list(kernel.shape[1:3]) else kernel.new_zeros
    copy = new((kernel.shape[0], *kernel.shape[3:], rounded[2 - inner], rounded[inner - 1]))
    channels = (-1, -2) if inner == 1 else (-2, -1)
    copy = copy.permute(0, *channels, *range(1, copy.ndim - 2))
    copy[:, : kernel.shape[1], : kernel.shape[2]].copy_(kernel)
    return copy


def closer(tensor: Tensor, one: int, other: int) -> bool:
    """Whether a dimension of a tensor lies closer in memory than another."""
    return abs(tensor.stride(one)) < abs(tensor.stride(other))


def is_wide(*tensors: Tensor, first: Tensor, offsets: Sequence[int]) -> bool:
    """Whether offsets inside one item of the tensors' first dimension need more than 32 bits.

    Those in `first`, (B, *, *, x, y, z), go further than its memory does: a window's offsets, of which `offsets` are the
    largest along each spatial dimension, meet its strides before taps are taken from them.
    """
    spans = [sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors]
    extent = [first.shape[1] - 1, first.shape[2] - 1, *map(max, offsets, [n - 1 for n in first.shape[3:]])]
    spans.append(sum(n * abs(s) for n, s in zip(extent, first.stride()[1:], strict=True)))
    return max(spans) >= 2**31
