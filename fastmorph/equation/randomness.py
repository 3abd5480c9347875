"""Noise by seeds: streams with names, and noise for batches of equations; its values are those of `fastmorph_kernels.noise`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastmorph.errors import MorphError

if TYPE_CHECKING:
    from fastmorph_kernels.noise import Keys

Generator = torch.Generator | np.random.Generator | int | None

VERSION = 2  # of the noise and of the closed form: another one would give the same plan another child


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
        halves: Tensor = _counter().levels(self.key, start, stop, torch.device(device))
        return halves

    def fill(self, out: Tensor, scale: float = 1.0, start: int = 0) -> Tensor:
        """Set `out`, any strides, to the values from `start` on, in the order of its indices, times `scale`; it is returned."""
        if out.is_contiguous():
            _counter().fill(out.view(-1), self.key, start, scale)
        elif out.device.type == "cpu" and out.numel() > 2 * _counter().BLOCK and len(out) > 1:
            row = out[0].numel()
            for at, part in enumerate(out.split(step := max(1, 2 * _counter().BLOCK // row))):
                self.fill(part, scale, start + at * step * row)
        else:
            _counter().put(out, self.levels(start, start + out.numel(), out.device).view(out.shape), scale)
        return out

    def tensor(self, shape: Sequence[int], like: Tensor, scale: float = 1.0, row: int = 0) -> Tensor:
        """New values times `scale`, of the dtype and on the device of `like`: rows from `row` on of a longer tensor."""
        return self.fill(like.new_empty(tuple(shape)), scale, row * math.prod(shape[1:]))

    def below(self, bounds: np.ndarray) -> np.ndarray:
        """An integer from 0 to below each of `bounds` (below 2**31), of its shape, on the CPU: word i decides the i-th."""
        words = _counter().words_on_host(self.key, 0, bounds.size).astype(np.uint64).reshape(bounds.shape)
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
        mix = _counter().mix_keys
        keys = [mix(seed, item) for seed, batch in zip(seeds, batches, strict=True) for item in range(batch)]
        self._keys: Keys = np.array(keys, np.uint64)
        self._draws = np.zeros_like(self._keys)  # so far, of each item
        self._items: Any = slice(None)  # all, or a number each

    def of(self, items: Tensor) -> Noise:
        """The noise of some items of the batch; what they draw there counts here too."""
        part = copy(self)
        part._items = np.arange(len(self._keys))[self._items][items.cpu().numpy()]
        return part

    def __call__(self, *shape: int, over: float = 1.0) -> Tensor:
        """The next draw, (B, *shape), of two dimensions or more, over a number.

        Row r of an item is the stream of r under the draw's key.
        """
        rows, *rest = shape
        mix = _counter().mix_keys
        keys = mix(mix(self.keys(1)[:, None], np.uint64(0)), np.arange(rows, dtype=np.uint64))  # (B, rows)
        out = torch.empty(keys.size, math.prod(rest), dtype=self.dtype, device=self.device)
        _counter().fill(out, keys.reshape(-1), 0, 1.0, over)
        return out.view(len(keys), *shape)

    def keys(self, draws: int) -> Keys:
        """A key for each item, (B,) uint64, under which number n < `draws` is the n-th of the next draws."""
        keys: Keys = self._keys[self._items] + self._draws[self._items] * _counter().GOLDEN
        self._draws[self._items] += draws
        return keys


def signs(channels: int) -> Tensor:
    """1 or -1 for each channel, (C,) float64 on the CPU, by their number."""
    drawn: Tensor = _counter().signs(channels)
    return drawn


@cache
def _counter() -> Any:
    """`fastmorph_kernels.noise`, at first use: the kernels' package is no part of `import fastmorph`."""
    return importlib.import_module("fastmorph_kernels.noise")
