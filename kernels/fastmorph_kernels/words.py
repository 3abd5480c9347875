"""On the device: the words and values of `noise`."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from . import noise

_GOLDEN, _MIX1, _MIX2 = tl.constexpr(noise.GOLDEN), tl.constexpr(noise.MIX1), tl.constexpr(noise.MIX2)
_STEP, _FIRST, _SECOND = tl.constexpr(noise.STEP), tl.constexpr(noise.FIRST), tl.constexpr(noise.SECOND)
NOISE_SCALE = tl.constexpr(noise.SCALE)


@triton.jit
def mix_key(key, number):
    """The key of a number under a key, both uint64."""
    x = key + number * tl.full((), _GOLDEN, tl.uint64)
    x = (x ^ (x >> 30)) * tl.full((), _MIX1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), _MIX2, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def word_at(mixed, word):
    """Words of streams, uint32, from what `noise_at` takes."""
    x = word * tl.full((), _STEP, tl.uint32) + mixed.to(tl.uint32)
    x = ((x ^ (x >> 16)) * tl.full((), _FIRST, tl.uint32)) ^ (mixed >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), _SECOND, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def noise_at(mixed, word, odd):
    """Values of streams, float32, yet to be multiplied by their scale.

    mixed: a stream's key, mixed with the high half of its words' numbers, uint64; word: the low half, uint32; odd: whether the
    value is the word's high half. They broadcast.
    """
    x = word_at(mixed, word)
    half = tl.where(odd, x >> 16, x & 0xFFFF)
    return half.to(tl.uint16).to(tl.int16, bitcast=True).to(tl.float32) + 0.5
