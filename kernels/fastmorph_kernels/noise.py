"""Noise from a counter: a value follows from its stream's key and its index alone, in whatever order and part it is drawn.

It is uniform, of 16 bits, mean 0 and variance 1: its distribution does not matter here, only that matrices of it have full
rank. A stream consists of words of 32 bits. The low half of word i is value 2 i, the high half value 2 i + 1. With (k1, k0) the
high and low half of mix(key + (i >> 32) * G), word i is

    x = i * 0x9E3779B1 + k0
    x = (x ^ x >> 16) * 0x7FEB352D ^ k1
    x = (x ^ x >> 15) * 0x846CA68B
    x = x ^ x >> 16                           modulo 2^32, with logical shifts,

and a half h, as a signed number, is the value (h + 1/2) * 12^(1/2) / 2^16. G is 0x9E3779B97F4A7C15, and mix is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014); the constants of a word are those of Wellons's "lowbias32" (2018). The stream that
belongs to a number under a key has the key mix(key + number * G). Kernels make the same words: `words.py`.

Measured a value, on one core of a CPU with AVX-512, in blocks that stay in cache: this in numpy 0.42 ns, SplitMix64 in numpy
0.56, numpy's Philox 0.9 to 1.2, PyTorch's Mersenne Twister 0.8, SplitMix64 in PyTorch 1.2, this in PyTorch 1.4. A word of 32
bits is also the cheapest on processors that have no product of 64 bits: older CPUs, and GPUs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

Keys = np.ndarray[Any, np.dtype[np.uint64]]
Words = np.ndarray[Any, np.dtype[np.uint32]]

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
STEP, FIRST, SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
SCALE = 12.0**0.5 / 2**16
FEW = 2**18  # values that are made on the host, wherever they go: quicker than the launches that it takes to make them there
BLOCK = 2**15  # words at a time on a CPU: they stay in its cache, and calls cost little beside them
_MASK = 2**64 - 1


def mix_keys(key: Any, number: Any) -> Any:
    """The key of a number under a key, mix(key + number * G): of ints, or of arrays of uint64 that broadcast."""
    x = key + number * GOLDEN
    if isinstance(x, int):
        x &= _MASK
        x = ((x ^ x >> 30) * MIX1) & _MASK
        x = ((x ^ x >> 27) * MIX2) & _MASK
        return x ^ x >> 31
    x = x ^ x >> 30
    x *= MIX1
    x ^= x >> 27
    x *= MIX2
    x ^= x >> 31
    return x


def fill(out: Tensor, keys: int | Keys, start: int, scale: float, over: float = 1.0) -> None:
    """Set `out`, of one stream (n) or several (S, n), to values from `start` on, times `scale`, and divide them by `over`.

    On a CPU, in blocks.
    """
    if not out.numel():
        return
    if out.device.type != "cpu" and out.numel() <= FEW:
        here = torch.empty(out.shape, dtype=out.dtype, device="cpu", pin_memory=out.device.type == "cuda")
        fill(here, keys, start, scale, over)
        out.copy_(here, non_blocking=True)
        return
    size, most = out.shape[-1], 2 * BLOCK if out.device.type == "cpu" else out.numel()
    if not isinstance(keys, int) and len(keys) > (together := max(1, most // size)):
        for row in range(0, len(keys), together):
            fill(out[row : row + together], keys[row : row + together], start, scale, over)
        return
    for at in range(0, size, most):
        part = out[..., at : at + most]
        put(part, levels(keys, start + at, start + at + part.shape[-1], out.device), scale)
        if over != 1.0:
            part.div_(over)


def put(out: Tensor, values: Tensor, scale: float) -> None:
    """Values from levels, in float32 or float64, by one fused multiply-add: one rounding, as half the factor is exact."""
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    factor = SCALE * scale if dtype == torch.float64 else float(np.float32(SCALE * scale))
    into = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    torch.add(_half(factor, dtype), values.to(dtype), alpha=factor, out=into)
    if into is not out:
        out.copy_(into)


@functools.lru_cache(maxsize=64)
def _half(factor: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(0.5 * factor, dtype=dtype, device="cpu")  # whatever the default device is


def levels(keys: int | Keys, start: int, stop: int, device: torch.device) -> Tensor:
    """The values [start, stop) of streams as halves of words, (*S, stop - start) int16."""
    first, last = start // 2, -(-stop // 2)
    cut = min(last, ((first >> 32) + 1) << 32)  # behind it words have other keys
    words = _words(keys, first, cut, device)
    if cut < last:
        words = torch.cat([words, _words(keys, cut, last, device)], -1)
    halves: Tensor = words.view(torch.int16)
    return halves[..., start - 2 * first : stop - 2 * first]


def signs(channels: int) -> Tensor:
    """1 or -1 for each channel, float64 on the CPU: bit c % 8 of word c // 8 of the stream of their number says -1 for c."""
    words = words_on_host(channels, 0, -(-channels // 8))
    bits = (words[:, None] >> np.arange(8, dtype=np.uint32)) & 1
    return torch.from_numpy(1.0 - 2.0 * bits.reshape(-1)[:channels])


def words_on_host(keys: int | Keys, start: int, stop: int) -> Words:
    """The words [start, stop), all of one `i >> 32`, of streams, (*S, stop - start)."""
    added, k1 = _halves(keys, start)
    x: Words = _steps(stop - start) + added
    x ^= x >> 16
    x *= FIRST
    x ^= k1
    x ^= x >> 15
    x *= SECOND
    x ^= x >> 16
    return x


def _words(keys: int | Keys, start: int, stop: int, device: torch.device) -> Tensor:
    """The same as a tensor of int32."""
    if device.type == "cpu":
        return torch.from_numpy(words_on_host(keys, start, stop).view(np.int32))
    return words_on_device(keys, start, stop, device)


def _halves(keys: int | Keys, start: int) -> tuple[Any, Any]:
    """What is added to the steps of words from `start` on, and k1: ints, or (S, 1) uint32."""
    mixed = mix_keys(keys if isinstance(keys, int) else keys[:, None], start >> 32)
    added, k1 = (mixed + start * STEP % 2**32) & 0xFFFFFFFF, mixed >> 32
    return (added, k1) if isinstance(keys, int) else (added.astype(np.uint32), k1.astype(np.uint32))


def words_on_device(keys: int | Keys, start: int, stop: int, device: torch.device) -> Tensor:
    """The same where tensors have no unsigned words: a shift keeps the sign, which a mask takes away."""
    added, k1 = (_signed(half, device) for half in _halves(keys, start))
    x: Tensor = torch.arange(stop - start, dtype=torch.int32, device=device).mul_(_signed(STEP, device)) + added
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(FIRST, device)
    x ^= k1
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(SECOND, device)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(word: int | Words, device: torch.device) -> Any:
    if isinstance(word, int):
        return word - 2**32 if word >= 2**31 else word
    return torch.from_numpy(word.view(np.int32)).to(device, non_blocking=True)


_table = np.arange(BLOCK, dtype=np.uint32) * np.uint32(STEP)


def _steps(count: int) -> Words:
    """(count,): i * STEP modulo 2**32."""
    return _table[:count] if count <= BLOCK else np.arange(count, dtype=np.uint32) * np.uint32(STEP)
