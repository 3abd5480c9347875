"""Where a kernel stands in the frame of the two kernels that replace it.

The full convolution of kernels of sizes K1 and K2 has size N = K1 + K2 - 1 in each spatial dimension, the *frame*. The
weight, of size K <= N, stands in it with `before` = (N - K) // 2 zeros in front and `after` = N - K - `before` behind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastmorph.errors import MorphError

Size = tuple[int, ...]
Side = Literal["second", "first"]  # one of the two kernels
SIDES: tuple[Side, ...] = ("second", "first")


@dataclass(frozen=True)
class Frame:
    """The sizes of a weight and of the two kernels that are to compose it, one entry per spatial dimension."""

    kernel: Size
    first: Size
    second: Size

    @property
    def size(self) -> Size:
        """Size N = K1 + K2 - 1 of the composed kernel."""
        return tuple(a + b - 1 for a, b in zip(self.first, self.second, strict=True))

    @property
    def before(self) -> Size:
        """Zeros in front of the weight in the frame."""
        return tuple((n - k) // 2 for n, k in zip(self.size, self.kernel, strict=True))

    @property
    def after(self) -> Size:
        """Zeros behind the weight in the frame."""
        return tuple(n - k - b for n, k, b in zip(self.size, self.kernel, self.before, strict=True))

    @property
    def transposed(self) -> Frame:
        """The frame of the transposed equation, in which the two kernels change places."""
        return Frame(self.kernel, self.second, self.first)

    def shrinking(self) -> Iterator[Frame]:
        """The frames of Algorithm 2: K2, K2 - 1, ... down to 1 in every dimension, while the weight still fits."""
        for less in range(max(self.second, default=1)):
            frame = Frame(self.kernel, self.first, tuple(max(1, k - less) for k in self.second))
            if any(n < k for n, k in zip(frame.size, frame.kernel, strict=True)):
                break
            yield frame

    def second_padding(self, inner: Frame) -> list[tuple[int, int]]:
        """Zeros before and after the second kernel of `inner` (this frame, shrunken) that bring it to this frame."""
        before = [outer - small for outer, small in zip(self.before, inner.before, strict=True)]
        sizes = zip(self.second, inner.second, before, strict=True)
        return [(b, outer - small - b) for outer, small, b in sizes]

    def fits(self, *, within_first: bool) -> bool:
        """Whether the whole weight fits into the first (else the second) kernel alone."""
        outer = self.first if within_first else self.second
        return all(o >= k for o, k in zip(outer, self.kernel, strict=True))


def make_frame(kernel: Sequence[int], kernel_sizes: Sequence[int | Sequence[int]]) -> Frame:
    """Check `kernel_sizes` (an int or a tuple per layer) against a weight of size `kernel` and build their frame.

    Raises MorphError if there are not two of them, if one is not a positive size for each spatial dimension, or if their
    frame is smaller than the weight.
    """
    kernel = tuple(kernel)
    dims = len(kernel)
    if dims == 0:
        return Frame((), (), ())
    if not isinstance(kernel_sizes, Sequence) or len(kernel_sizes) != 2:
        raise MorphError(f"kernel_sizes must hold two entries, one per layer, such as (3, 3); got {kernel_sizes!r}.")
    first, second = (size_per_dimension(size, dims) for size in kernel_sizes)
    frame = Frame(kernel, first, second)
    if any(n < k for n, k in zip(frame.size, kernel, strict=True)):
        raise MorphError(
            f"kernel sizes {first} and {second} compose to a frame of {frame.size}, smaller than the weight's {kernel}; "
            f"enlarge one of them until K1 + K2 - 1 >= K in every dimension."
        )
    return frame


def size_per_dimension(size: int | Sequence[int], dims: int) -> Size:
    """An int, or one int per spatial dimension, as the latter. Raises MorphError unless all are positive."""
    sizes = (size,) * dims if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sizes) != dims or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes):
        raise MorphError(
            f"kernel size {size!r} is not a positive int, nor {dims} of them, for a weight with {dims} spatial dimension(s)."
        )
    return sizes


def taps(size: Size) -> Iterator[Size]:
    """All positions of a kernel of `size`, in row-major order; one empty position where there is no spatial dimension."""
    return itertools.product(*map(range, size))


def window(start: Size, size: Size) -> tuple[Any, ...]:
    """The slices that cut a box of `size` at `start`."""
    return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


def one_tap(tap: Size) -> tuple[Any, ...]:
    """The index of one tap of a kernel (C_out, C_in, *K)."""
    return (slice(None), slice(None), *tap)


def tap_count(size: Size) -> int:
    """Number of taps of a kernel of `size`."""
    return math.prod(size)
