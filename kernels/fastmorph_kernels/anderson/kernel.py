"""Triton kernels for the memory of Anderson acceleration: m <= 32 long vectors for each item of a batch.

    gram[b, i, j] = sum over n of moves[b, i, n] * moves[b, j, n]        j < m
    gram[b, i, m] = sum over n of moves[b, i, n] * move[b, n]
    out[b, n] = image[b, n] - sum over i of share[b, i] * images[b, i, n]

    images, moves (B, m, N), image, move (B, N), share (B, m) -> gram (B, m, m + 1), out (B, N)

Both are bound by the one pass that they make over the memory.

- `_gram_kernel`: a program owns a stretch of N and multiplies its part of the memory by its own transpose, all m rows of it
  at once, so that no entry is read twice. Its partial sums go to `partial` (B, S, m, m + 1), which `_total_kernel` adds up,
  a stretch after the other. A stretch does not depend on the batch: nor does the result, to the bit.
- `_update_kernel`: a program owns a stretch of one item.

Sums run in a fixed order, without atomics.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..configs import launch_options, lookup

_TOTAL_S, _TOTAL_N = 64, 32  # partial sums and entries in a tile of their addition, which is small


@dataclass(frozen=True)
class AndersonConfig:
    """Tile sizes and launch settings; `block_n` is a power of two, at least 16."""

    block_n: int  # entries of a vector in one tile
    num_warps: int
    num_stages: int
    tiles: int = 1  # of a stretch, the part of a vector that one program of the Gram kernel owns


def config_for(variant: str, like: torch.Tensor) -> AndersonConfig:
    """The configuration of a variant, "gram" or "update", for tensors like this one."""
    return AndersonConfig(**lookup("anderson", like.dtype, variant, like.device))


@triton.jit
def _gram_kernel(
    moves_ptr,
    move_ptr,
    partial_ptr,
    size,
    memory,
    stretches,
    stride_mb,
    stride_mm,
    stride_mn,
    stride_nb,
    stride_nn,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    pid = tl.program_id(0)
    stretch = pid % stretches
    pid_b = (pid // stretches).to(tl.int64)
    moves_ptr += pid_b * stride_mb
    move_ptr += pid_b * stride_nb
    rows = tl.arange(0, BLOCK_M)
    mask_m = rows < memory
    row_ptrs = moves_ptr + rows.to(tl.int64) * stride_mm  # [BLOCK_M]
    products = tl.zeros((BLOCK_M, BLOCK_M), dtype=ACC)
    right = tl.zeros((BLOCK_M,), dtype=ACC)
    for tile in range(0, TILES):
        offs = stretch.to(tl.int64) * (TILES * BLOCK_N) + tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs < size
        block = tl.load(
            row_ptrs[:, None] + offs[None, :] * stride_mn, mask=mask_m[:, None] & mask_n[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_N]
        move = tl.load(move_ptr + offs * stride_nn, mask=mask_n, other=0.0)  # [BLOCK_N]
        block = block.to(ACC)
        products = tl.dot(block, tl.trans(block), products, input_precision="ieee", out_dtype=ACC)
        right += tl.sum(block * move.to(ACC)[None, :], 1)  # [BLOCK_M]
    partial_ptr += (pid_b * stretches + stretch) * memory * (memory + 1)
    out_ptrs = partial_ptr + rows * (memory + 1)
    tl.store(out_ptrs[:, None] + rows[None, :], products, mask=mask_m[:, None] & mask_m[None, :])
    tl.store(out_ptrs + memory, right, mask=mask_m)


@triton.jit
def _total_kernel(partial_ptr, out_ptr, entries, stretches, blocks, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    pid = tl.program_id(0)
    pid_b = (pid // blocks).to(tl.int64)
    offs = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs < entries
    total = tl.zeros((BLOCK_N,), dtype=out_ptr.dtype.element_ty)
    for start in range(0, stretches, BLOCK_S):
        places = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        part_ptrs = partial_ptr + ((pid_b * stretches + places) * entries)[:, None] + offs[None, :]
        total += tl.sum(tl.load(part_ptrs, mask=(places < stretches)[:, None] & mask_n[None, :], other=0.0), 0)
    tl.store(out_ptr + pid_b * entries + offs, total, mask=mask_n)


@triton.jit
def _update_kernel(
    image_ptr,
    images_ptr,
    share_ptr,
    out_ptr,
    size,
    memory,
    stretches,
    stride_jb,
    stride_jn,
    stride_ib,
    stride_im,
    stride_in,
    stride_sb,
    stride_sm,
    stride_ob,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_b = (pid // stretches).to(tl.int64)
    slots = tl.arange(0, BLOCK_M)
    mask_m = slots < memory
    share = tl.load(share_ptr + pid_b * stride_sb + slots.to(tl.int64) * stride_sm, mask=mask_m, other=0.0)  # [BLOCK_M]
    slot_ptrs = images_ptr + pid_b * stride_ib + slots.to(tl.int64) * stride_im  # [BLOCK_M]
    offs = (pid % stretches).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs < size
    block = tl.load(
        slot_ptrs[:, None] + offs[None, :] * stride_in, mask=mask_m[:, None] & mask_n[None, :], other=0.0
    )  # [BLOCK_M, BLOCK_N]
    image = tl.load(image_ptr + pid_b * stride_jb + offs * stride_jn, mask=mask_n, other=0.0)  # [BLOCK_N]
    out = image - tl.sum(block * share[:, None], 0)
    tl.store(out_ptr + pid_b * stride_ob + offs * stride_on, out, mask=mask_n)


def stretches_of(moves: torch.Tensor, config: AndersonConfig) -> int:
    """How many programs share the memory (B, m, N) of one item."""
    count: int = triton.cdiv(moves.shape[2], config.block_n * config.tiles)
    return count


def launch_gram(moves: torch.Tensor, move: torch.Tensor, partial: torch.Tensor, *, config: AndersonConfig) -> None:
    """Fill `partial` (B, S, m, m + 1), contiguous, S as `stretches_of` has it; nothing is empty.

    moves (B, m, N), move (B, N), any strides.
    """
    batch, memory, size = moves.shape
    stretches = partial.shape[1]
    _gram_kernel[(batch * stretches,)](
        moves,
        move,
        partial,
        size,
        memory,
        stretches,
        *moves.stride(),
        *move.stride(),
        TILES=config.tiles,
        BLOCK_M=rows_of(memory),
        BLOCK_N=config.block_n,
        **launch_options(config),
    )


def launch_total(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Add up partial (B, S, m, m + 1) into out (B, m, m + 1), both contiguous and of one dtype, neither empty."""
    entries = out[0].numel()
    blocks = triton.cdiv(entries, _TOTAL_N)
    tile = {"BLOCK_S": _TOTAL_S, "BLOCK_N": _TOTAL_N}
    grid = (out.shape[0] * blocks,)
    _total_kernel[grid](partial, out, entries, partial.shape[1], blocks, **tile, num_warps=4, enable_fp_fusion=True)


def launch_update(
    image: torch.Tensor, images: torch.Tensor, share: torch.Tensor, out: torch.Tensor, *, config: AndersonConfig
) -> None:
    """Fill out (B, N). image (B, N), images (B, m, N), share (B, m), any strides; nothing but m is empty."""
    batch, memory, size = images.shape
    block_n = min(config.block_n, triton.next_power_of_2(size))
    stretches = triton.cdiv(size, block_n)
    _update_kernel[(batch * stretches,)](
        image,
        images,
        share,
        out,
        size,
        memory,
        stretches,
        *image.stride(),
        *images.stride(),
        *share.stride(),
        *out.stride(),
        BLOCK_M=rows_of(memory),
        BLOCK_N=block_n,
        **launch_options(config),
    )


def rows_of(memory: int) -> int:
    """Rows of a tile that holds a whole memory: a power of two, and no fewer than a matrix product takes."""
    rows: int = max(16, triton.next_power_of_2(memory))
    return rows
