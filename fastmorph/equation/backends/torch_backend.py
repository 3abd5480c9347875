"""The equation's linear maps as batched matrix products over taps, on any device that PyTorch has.

Every map takes one leading batch dimension and loops over kernel taps at most, never over the batch, and never builds the
dense system. Shapes: B batch; G (B, Co, Ci, *K); F1 (B, Ch, Ci, *K1); F2 (B, Co, Ch, *K2); N = K1 + K2 - 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.backends.protocol import ClosedForm, ClosedForms
from fastmorph.equation.banded import BandedCholesky
from fastmorph.equation.frame import Frame, Size, tap_count, taps, window

if TYPE_CHECKING:
    from fastmorph_kernels.noise import Keys

_LITTLE = 2**15  # numbers
_SOME = 2**17  # numbers that may be copied
_LAUNCH = 2**24  # numbers in a product that fills another device
T = TypeVar("T")
PRECISIONS = ("float64", "ieee", "tf32x3", "tf32")


@dataclass(frozen=True)
class TorchBackend:
    """Plain PyTorch, a `Backend`. Others replace the maps that they have kernels for."""

    precision: str | None = None
    name: ClassVar[str] = "torch"
    takes_unlike: ClassVar[bool] = False

    def implementation(self, solver: T, reference: T) -> T:
        """The solver on this backend's maps."""
        return solver

    def working_dtype(self, device: torch.device) -> torch.dtype:
        """What the solvers work in: float64 unless told otherwise, or float32 on Apple's GPUs, which have no float64."""
        return torch.float64 if self.precision in (None, "float64") and device.type != "mps" else torch.float32

    def in_float32(self) -> TorchBackend:
        """The same maps, for float32 tensors in the precision of float32, as fast as that goes."""
        return self

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Full convolution F2 * F1: (B, Ch, Ci, *K1), (B, Co, Ch, *K2) -> (B, Co, Ci, *N)."""
        if torch.finfo(first.dtype).bits < 32:  # taps would be added up in the low precision
            return self.compose(first.float(), second.float()).to(first.dtype)
        k1, k2 = tuple(first.shape[3:]), tuple(second.shape[3:])
        if tap_count(k1) < tap_count(k2):  # loop over the smaller kernel: the transposed equation swaps the two
            return self.compose(second.transpose(1, 2), first.transpose(1, 2)).transpose(1, 2)
        b, ch, ci = first.shape[:3]
        co = second.shape[1]
        rows = first.flatten(2)  # (B, Ch, Ci*|K1|)
        by_tap = second.permute(0, *range(3, second.ndim), 1, 2).reshape(b, tap_count(k2), co, ch)  # (B, |K2|, Co, Ch)
        n = tuple(one + two - 1 for one, two in zip(k1, k2, strict=True))
        if n and co * ci * tap_count(k2) * tap_count(n) <= 2 * _LITTLE:  # whatever the batch, so that it changes no bits
            products = torch.bmm(by_tap.flatten(1, 2), rows).view(b, *k2, co, ci, *k1)
            return _skewed(products, n).sum(tuple(range(1, 1 + len(n))))
        out = first.new_zeros(b, co, ci, *n)
        # As many taps at once as fit into little memory: for small kernels a product costs no more than its launch.
        little = _LAUNCH if host_waits(first.device) else _LITTLE
        some = max(1, little // max(1, b * co * rows.shape[2]))
        for at, v in enumerate(taps(k2)):
            if at % some == 0:
                products = torch.bmm(by_tap[:, at : at + some].flatten(1, 2), rows).view(
                    b, min(some, tap_count(k2) - at), co, ci, *k1
                )
            out[(..., *window(v, k1))].add_(products[:, at % some])  # += would write it twice
        return out

    def error(self, target: Tensor, before: Size, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """T - F2 * F1, (B, Co, Ci, *N), where the target (B, Co, Ci, *K) stands behind `before` zeros, and its norm (B,)."""
        composed = self.compose(first, second)
        error = pad(target, before, tuple(composed.shape[3:])) - composed
        return error, frobenius(error)

    def correlate(self, target: Tensor, before: Size, first: Tensor, k2: Size) -> Tensor:
        """Adjoint of `compose` in F2: sum over i, w of T[o, i, v + w] * F1[h, i, w], -> (B, Co, Ch, *K2).

        `target` (B, Co, Ci, *K) stands in the frame behind `before` zeros; products with the zeros around it are skipped.
        """
        k, k1 = tuple(target.shape[3:]), tuple(first.shape[3:])
        by_tap = first.new_zeros(*k2, target.shape[0], target.shape[1], first.shape[1])
        for v in taps(k2):
            # F1's taps w in [low, high) are those that meet the target: 0 <= v + w - before < K.
            low = tuple(max(0, b - x) for b, x in zip(before, v, strict=True))
            high = tuple(min(n, b - x + m) for n, b, x, m in zip(k1, before, v, k, strict=True))
            size = tuple(h - a for h, a in zip(high, low, strict=True))
            if min(size, default=1) <= 0:
                continue
            start = tuple(x + a - b for x, a, b in zip(v, low, before, strict=True))
            left = target[(..., *window(start, size))].flatten(2)  # (B, Co, Ci*|size|)
            right = first[(..., *window(low, size))].flatten(2)  # (B, Ch, Ci*|size|)
            by_tap[v] = torch.bmm(left, right.mT)
        return taps_last(by_tap)

    def row_gram(self, first: Tensor, k2: Size) -> Tensor:
        """Lower triangle of A A^T, (B, |K2|*Ch, |K2|*Ch), rows ordered tap by tap; the upper one is left at zero.

        Block Toeplitz: the block (v, v') depends on the lag v - v' alone, and a lag's block is the transpose of its
        opposite's, so each is computed once and the lower triangle needs the lexicographically non-negative ones only.
        """
        b, ch = first.shape[:2]
        k1 = tuple(first.shape[3:])
        out = first.new_zeros(b, tap_count(k2), ch, tap_count(k2), ch)
        positions = list(taps(k2))
        pairs: dict[Size, list[tuple[int, int]]] = {}
        for r, v in enumerate(positions):
            for c, w in enumerate(positions[: r + 1]):
                pairs.setdefault(tuple(x - y for x, y in zip(v, w, strict=True)), []).append((r, c))
        for lag, places in pairs.items():
            # sum over i, w of F1[h, i, w] * F1[h', i, w + lag]
            size = tuple(n - abs(d) for n, d in zip(k1, lag, strict=True))
            if min(size, default=1) <= 0:
                continue
            here = first[(..., *window(tuple(max(0, -d) for d in lag), size))].flatten(2)
            there = first[(..., *window(tuple(max(0, d) for d in lag), size))].flatten(2)
            block = torch.bmm(here, there.mT)
            for r, c in places:
                out[:, r, :, c, :] = block
        return out.view(b, tap_count(k2) * ch, tap_count(k2) * ch)

    def column_gram(self, first: Tensor, k2: Size) -> Tensor:
        """A^T A, (B, |N|*Ci, |N|*Ci), columns ordered tap by tap: |K2| shifted copies of one product over the hidden channels.

        Tap by tap, because channels are then what lies side by side in memory, and the copies are added up at its speed.
        """
        b, ch, ci = first.shape[:3]
        k1 = tuple(first.shape[3:])
        n = tuple(a + c - 1 for a, c in zip(k1, k2, strict=True))
        rows = first.permute(0, *range(3, first.ndim), 2, 1).reshape(b, -1, ch)  # (B, |K1|*Ci, Ch)
        product = torch.bmm(rows, rows.mT).view(b, *k1, ci, *k1, ci)
        out = first.new_zeros(b, *n, ci, *n, ci)
        for v in taps(k2):
            out[(slice(None), *window(v, k1), slice(None), *window(v, k1))].add_(product)
        return out.view(b, ci * tap_count(n), ci * tap_count(n))

    def factor(self, gram: Tensor, blocks: int, width: int) -> BandedCholesky:
        """Cholesky factor of the lower triangle of (B, n, n), of so many block rows, zero further than `width` blocks away."""
        return BandedCholesky(gram, blocks, width)

    def anderson_step(self, image: Tensor, move: Tensor, images: Tensor, moves: Tensor) -> Tensor:
        """The image less the combination of `images` whose combination of `moves` is nearest to `move`.

        image (B, ...) of n numbers; move (B, n); images and moves (B, m, n) -> (B, ...).
        """
        share = torch.linalg.pinv(moves.mT) @ move[:, :, None]  # (B, m, 1)
        return image - (images.mT @ share).view(image.shape)

    def direct(
        self,
        weight: Tensor,
        hidden: int,
        frame: Frame,
        keys: Keys,
        factors: tuple[Tensor, Tensor] | None,
        *,
        density: float,
        into_first: bool,
    ) -> tuple[Tensor, Tensor]:
        """Both factors of the closed form, (B, Ch, Ci, *K1) and (B, Co, Ch, *K2), in the weight's dtype.

        `keys` (B,) are those of each item's noise, `factors` those of `Choice`, `density` that of `Direct`.
        """
        batch, co, ci = weight.shape[:3]
        first = weight.new_empty((batch, hidden, ci, *frame.first))
        second = weight.new_empty((batch, hidden, co, *frame.second)).transpose(1, 2)  # as it is written
        work, left = self.working_dtype(weight.device), None
        if factors is not None:
            left, weight = (factor.to(work) for factor in factors)
            weight = weight if into_first else weight.transpose(1, 2)
        options: dict[str, Any] = {"density": density, "into_first": into_first, "left": left, "work": work}
        options["queued"] = host_waits(weight.device)
        fill = importlib.import_module("fastmorph_kernels.direct.op").fill_plainly
        fill((first, second), weight, frame.before, keys, **options)
        return first, second

    def direct_many(self, equations: Sequence[ClosedForm], *, density: float, limit: float) -> ClosedForms:
        """For backends that take unlike equations."""
        raise NotImplementedError(f"the {self.name} backend solves alike equations in batches")


def _skewed(taps: Tensor, n: Size) -> Tensor:
    """(B, *K2, P, Q, *K1) with tap v of K2 moved by v in a frame of size N, among zeros, (B, *K2, P, Q, *N)."""
    dims = len(n)
    out = taps.new_zeros(*taps.shape[: 3 + dims], *n)
    strides = out.stride()
    # Tap v meets offset v + w of the frame, w in K1: all of that is one view of `out`, in which v moves both.
    both = [tap + place for tap, place in zip(strides[1 : 1 + dims], strides[3 + dims :], strict=True)]
    out.as_strided(taps.shape, (strides[0], *both, *strides[1 + dims :])).copy_(taps)
    return out


def dense_system(first: Tensor, k2: Size) -> Tensor:
    """A itself, (B, |K2|*Ch, Ci*|N|): only for the items whose Gram matrix is numerically singular."""
    b, ch, ci = first.shape[:3]
    k1 = tuple(first.shape[3:])
    n = tuple(a + c - 1 for a, c in zip(k1, k2, strict=True))
    rows = first[(slice(None), *(None,) * len(k2))].expand(b, *k2, ch, ci, *k1)
    return _skewed(rows, n).view(b, tap_count(k2) * ch, ci * tap_count(n))


def taps_first(kernel: Tensor) -> Tensor:
    """(B, O, I, *K) -> (*K, B, O, I), contiguous."""
    return kernel.permute(*range(3, kernel.ndim), 0, 1, 2).contiguous()


def taps_last(kernel: Tensor) -> Tensor:
    """(*K, B, O, I) -> (B, O, I, *K), a view."""
    dims = kernel.ndim - 3
    return kernel.permute(dims, dims + 1, dims + 2, *range(dims))


def pad(target: Tensor, before: Size, size: Size) -> Tensor:
    """Put a kernel (B, Co, Ci, *K) into a frame of `size`, behind `before` zeros."""
    kernel = target.shape[3:]
    widths: list[int] = []
    for k, b, n in reversed(list(zip(kernel, before, size, strict=True))):
        widths += [b, n - k - b]
    return torch.nn.functional.pad(target, widths) if any(widths) else target


def frobenius(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Frobenius norm of each batch item, (B, C, ...) -> (B,), taken in `dtype` without a copy of the tensor in it."""
    dims = tuple(range(1, tensor.ndim))
    if dtype in (None, tensor.dtype) or tensor.numel() <= _SOME or host_waits(tensor.device):
        return torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype)
    some = max(1, _SOME * tensor.shape[1] // tensor.numel())
    parts = [torch.linalg.vector_norm(part, dim=dims, dtype=dtype) for part in tensor.split(some, 1)]
    return torch.stack(parts).norm(dim=0)
