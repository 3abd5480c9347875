"""Noise from a counter: a value follows from its stream's key and its index alone, in whatever order and part it is drawn.

It is uniform, of 16 bits, mean 0 and variance 1: its distribution does not matter here, only that matrices of it have full
rank. A stream consists of words of 32 bits. The low half of word i is value 2 i, the high half value 2 i + 1. With (k1, k0) the
high and low half of mix(key + (i >> 32) * G), word i is

    x = i * 0x9E3779B1 + k0
    x = (x ^ x >> 16) * 0x7FEB352D ^ k1
    x = (x ^ x >> 15) * 0x846CA68B
    x = x ^ x >> 16                           modulo 2^32, with logical shifts,

and a half h, as a signed number, is the value (h + 1/2) * 12^(1/2) / 2^16. G is 0x9E3779B97F4A7C15, and mix is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014); the constants of a word are those of Wellons's "lowbias32" (2018).

Measured a value, on one core of a CPU with AVX-512, in blocks that stay in cache: this in numpy 0.42 ns, SplitMix64 in numpy
0.56, numpy's Philox 0.9 to 1.2, PyTorch's Mersenne Twister 0.8, SplitMix64 in PyTorch 1.2, this in PyTorch 1.4. A word of 32
bits is also the cheapest on processors that have no product of 64 bits: older CPUs, and GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmorph.errors import MorphError

Generator = torch.Generator | np.random.Generator | int | None
Keys = np.ndarray[Any, np.dtype[np.uint64]]
Words = np.ndarray[Any, np.dtype[np.uint32]]

VERSION = 1  # of the noise: another one would give the same plan another child
_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1
_STEP, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
_SCALE = 12.0**0.5 / 2**16
_FEW = 2**18  # values that are made on the host, wherever they go: quicker than the launches that it takes to make them there
_BLOCK = 2**15  # words at a time on a CPU: they stay in its cache, and calls cost little beside them


def draw_seed(generator: Generator) -> int:
    """One seed, from 0 to 2**63 - 1: an int itself, or drawn from a torch or numpy generator, from torch's global one if None.

    Raises MorphError for anything else.
    """
    return draw_seeds(generator, 1)[0]


def draw_seeds(generator: Generator | Sequence[int], count: int) -> list[int]:
    """So many seeds, drawn as `draw_seed` does. Of an int the first is the int itself, the others follow from it.

    Raises MorphError as `draw_seed` does, and for a sequence of seeds that are not so many.
    """
    if isinstance(generator, list | tuple) and len(generator) == count:
        return [draw_seed(seed) for seed in generator]
    if isinstance(generator, np.random.Generator):
        return [int(generator.integers(2**62)) for _ in range(count)]
    if isinstance(generator, torch.Generator) or generator is None:
        device = "cpu" if generator is None else generator.device
        return [int(torch.randint(2**62, (), generator=generator, device=device)) for _ in range(count)]
    if type(generator) is not int or not 0 <= generator < 2**63:
        raise MorphError(
            f"generator={generator!r}; pass a seed from 0 to 2**63 - 1, a torch.Generator, a numpy.random.Generator or None."
        )
    return [generator, *(Stream(generator).of(number).seed for number in range(1, count))]


@dataclass(frozen=True)
class Stream:
    """A stream of noise, endless for all purposes.

    Attributes:
        key: 64 bits; streams of other keys are independent of it.
    """

    key: int

    @property
    def seed(self) -> int:
        """A seed for what takes seeds, from 0 to 2**63 - 1."""
        return self.key >> 1

    def of(self, *names: int | str) -> Stream:
        """The stream that belongs to these names (a tensor, a purpose, a number) under this one."""
        digest = blake2b(repr((self.key, *names)).encode(), digest_size=8).digest()
        return Stream(int.from_bytes(digest, "little"))

    def levels(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """The halves of words behind the values [start, stop), int16."""
        return _levels(self.key, start, stop, torch.device(device))

    def fill(self, out: Tensor, scale: float = 1.0, start: int = 0) -> Tensor:
        """Set `out`, any strides, to the values from `start` on, in the order of its indices, times `scale`; it is returned."""
        if out.is_contiguous():
            _fill(out.view(-1), self.key, start, scale)
        elif out.device.type == "cpu" and out.numel() > 2 * _BLOCK and len(out) > 1:
            row = out[0].numel()
            for at, part in enumerate(out.split(step := max(1, 2 * _BLOCK // row))):
                self.fill(part, scale, start + at * step * row)
        else:
            _set(out, self.levels(start, start + out.numel(), out.device).view(out.shape), scale)
        return out

    def tensor(self, shape: Sequence[int], like: Tensor, scale: float = 1.0, row: int = 0) -> Tensor:
        """New values times `scale`, of the dtype and on the device of `like`: rows from `row` on of a longer tensor."""
        return self.fill(like.new_empty(tuple(shape)), scale, row * math.prod(shape[1:]))

    def below(self, bounds: np.ndarray) -> np.ndarray:
        """An integer from 0 to below each of `bounds` (below 2**31), of its shape, on the CPU: word i decides the i-th."""
        words = _words_numpy(self.key, 0, bounds.size).astype(np.uint64).reshape(bounds.shape)
        return (words * bounds.astype(np.uint64) >> 32).astype(np.int64)


class Noise:
    """Noise for a batch of problems of one shape, an item a problem or one of its groups: `noise(*shape)` -> (B, *shape).

    Each item has streams of its own, one a draw, so that it gets the same noise alone and among others.

    Args:
        seeds: of each problem.
        batches: how many items each problem has.
        device: where noise is drawn.
        dtype: what it is returned in; float64 and float32 have the same levels.
    """

    def __init__(self, seeds: Sequence[int], batches: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        items = [np.arange(batch, dtype=np.uint64) for batch in batches]
        numbers = np.concatenate([*items, np.zeros(0, np.uint64)])
        self._keys: Keys = _mix(np.repeat(np.array(seeds, np.uint64), batches), numbers)
        self._draws = np.zeros_like(self._keys)  # so far, of each item
        self._items = np.arange(len(self._keys))

    def of(self, items: Tensor) -> Noise:
        """The noise of some items of the batch; what they draw there counts here too."""
        part = copy(self)
        part._items = self._items[items.cpu().numpy()]
        return part

    def __call__(self, *shape: int) -> Tensor:
        """The next draw, (B, *shape), of two dimensions or more."""
        return self.parts(*shape)(slice(0, shape[1]))

    def parts(self, *shape: int) -> Callable[[slice], Tensor]:
        """The next draw, (B, *shape), in parts of its second dimension: what is returned takes a slice of it."""
        rows, _, *rest = shape
        keys = _mix(self._next()[:, None], np.arange(rows, dtype=np.uint64)).reshape(-1)
        batch, inner = len(self._items), math.prod(rest)

        def draw(part: slice) -> Tensor:
            out = torch.empty(len(keys), (part.stop - part.start) * inner, dtype=self.dtype, device=self.device)
            _fill(out, keys, part.start * inner, 1.0)
            return out.view(batch, rows, part.stop - part.start, *rest)

        return draw

    def seeds(self) -> Tensor:
        """A seed for each item, (B,) int64: the next draw."""
        return torch.from_numpy(self._next().view(np.int64)).to(self.device, non_blocking=True)

    def _next(self) -> Keys:
        """The key of each item's next draw."""
        keys: Keys = _mix(self._keys[self._items], self._draws[self._items])
        self._draws[self._items] += 1
        return keys


def _mix(key: Any, number: Any) -> Any:
    """The key of a number under a key, mix(key + number * G): of ints, or of arrays of uint64 that broadcast."""
    x = (key + number * _GOLDEN) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def _fill(out: Tensor, keys: int | Keys, start: int, scale: float) -> None:
    """Set `out`, of one stream (n) or several (S, n), to values from `start` on, times `scale`; in blocks on a CPU."""
    if not out.numel():
        return
    if out.device.type != "cpu" and out.numel() <= _FEW:
        here = torch.empty(out.shape, dtype=out.dtype, device="cpu", pin_memory=out.device.type == "cuda")
        _fill(here, keys, start, scale)
        out.copy_(here, non_blocking=True)
        return
    size, most = out.shape[-1], 2 * _BLOCK if out.device.type == "cpu" else out.numel()
    if not isinstance(keys, int) and len(keys) > (together := max(1, most // size)):
        for row in range(0, len(keys), together):
            _fill(out[row : row + together], keys[row : row + together], start, scale)
        return
    for at in range(0, size, most):
        part = out[..., at : at + most]
        _set(part, _levels(keys, start + at, start + at + part.shape[-1], out.device), scale)


def _set(out: Tensor, levels: Tensor, scale: float) -> None:
    """Values from levels, in float32 or float64, by one fused multiply-add: one rounding, as half the factor is exact."""
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    factor = torch.tensor(_SCALE * scale, dtype=dtype, device="cpu")  # whatever the default device is
    into = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    torch.add(0.5 * factor, levels.to(dtype), alpha=float(factor), out=into)
    if into is not out:
        out.copy_(into)


def _levels(keys: int | Keys, start: int, stop: int, device: torch.device) -> Tensor:
    """The values [start, stop) of streams as halves of words, (*S, stop - start) int16."""
    first, last = start // 2, -(-stop // 2)
    cut = min(last, ((first >> 32) + 1) << 32)  # behind it words have other keys
    words = _words(keys, first, cut, device)
    if cut < last:
        words = torch.cat([words, _words(keys, cut, last, device)], -1)
    return words.view(torch.int16)[..., start - 2 * first : stop - 2 * first]


def _words(keys: int | Keys, start: int, stop: int, device: torch.device) -> Tensor:
    """The words [start, stop), all of one `i >> 32`, of streams, (*S, stop - start) int32."""
    if device.type == "cpu":
        return torch.from_numpy(_words_numpy(keys, start, stop).view(np.int32))
    return _words_torch(keys, start, stop, device)


def _halves(keys: int | Keys, start: int) -> tuple[Any, Any]:
    """What is added to the steps of words from `start` on, and k1: ints, or (S, 1) uint32."""
    mixed = _mix(keys if isinstance(keys, int) else keys[:, None], start >> 32)
    added, k1 = (mixed + start * _STEP % 2**32) & 0xFFFFFFFF, mixed >> 32
    return (added, k1) if isinstance(keys, int) else (added.astype(np.uint32), k1.astype(np.uint32))


def _words_numpy(keys: int | Keys, start: int, stop: int) -> Words:
    added, k1 = _halves(keys, start)
    x: Words = _steps(stop - start) + added
    x ^= x >> 16
    x *= _FIRST
    x ^= k1
    x ^= x >> 15
    x *= _SECOND
    x ^= x >> 16
    return x


def _words_torch(keys: int | Keys, start: int, stop: int, device: torch.device) -> Tensor:
    """The same where tensors have no unsigned words: a shift keeps the sign, which a mask takes away."""
    added, k1 = (_signed(half, device) for half in _halves(keys, start))
    x = torch.arange(stop - start, dtype=torch.int32, device=device).mul_(_signed(_STEP, device)) + added
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(_FIRST, device)
    x ^= k1
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(_SECOND, device)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(word: int | Words, device: torch.device) -> Any:
    if isinstance(word, int):
        return word - 2**32 if word >= 2**31 else word
    return torch.from_numpy(word.view(np.int32)).to(device, non_blocking=True)


_table = np.arange(_BLOCK, dtype=np.uint32) * np.uint32(_STEP)


def _steps(count: int) -> Words:
    """(count,): i * STEP modulo 2**32."""
    return _table[:count] if count <= _BLOCK else np.arange(count, dtype=np.uint32) * np.uint32(_STEP)
