"""What can be exact: Claim 1, the counting bound and the rank bound, before any equation is solved."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fastmorph.equation.backends.torch_backend import dense_system, frobenius
from fastmorph.equation.frame import SIDES, Frame, Side, tap_count
from fastmorph.errors import MorphError

_LARGEST_RANK = 2048  # columns; a singular value decomposition of this size takes seconds
_OVERSAMPLED = 8  # columns beyond the rank, with which the range finder misses no more than `_MISSED` times the least
_MISSED = 1000


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative residual, ||G - F2 * F1|| / ||G||, that counts as exact for kernels stored in `dtype`.

    What rounding leaves, with a margin for the cancellation inside F2 * F1, and no more: float64 1e-10 (Gram systems cost
    digits that float64 has to spare), float32 5e-6 (42 eps), bfloat16 and float16 2 eps (both kernels are rounded).
    """
    fixed = {torch.float64: 1e-10, torch.float32: 5e-6}
    return fixed.get(dtype) or 2.0 * torch.finfo(dtype).eps


def half_step_is_exact(frame: Frame, co: int, ci: int, hidden: int, *, side: Side = "second") -> bool:
    """Whether one half-step for F2 (side "second") or F1 has loss 0 for random noise in the other kernel.

    Claim 1 of the paper: it has when C_hid * |K2| >= C_in * |K1 + K2 - 1|. That takes rows to be independent. They are not in
    some layers of few channels (depthwise ones above all) with two or more spatial dimensions: determinants of C_in + 1 hidden
    channels compose to zero there, as soon as kernels of size C_in * (K1 - 1) + 1 fit into K2. In that case alone the rank is
    computed, for noise.
    """
    if side == "first":
        return half_step_is_exact(frame.transposed, ci, co, hidden)
    if hidden * tap_count(frame.second) < ci * tap_count(frame.size):
        return False
    sizes = tuple((k1, k2) for k1, k2 in zip(frame.first, frame.second, strict=True) if k1 > 1)
    if len(sizes) < 2 or any(ci * (k1 - 1) + 1 > k2 for k1, k2 in sizes):
        return True
    return _has_full_rank(min(hidden, ci * tap_count(frame.size)), ci, sizes)


@lru_cache(maxsize=1024)
def _has_full_rank(hidden: int, ci: int, sizes: tuple[tuple[int, int], ...]) -> bool:
    k1, k2 = zip(*sizes, strict=True)
    columns = ci * tap_count(tuple(a + b - 1 for a, b in sizes))
    if columns > _LARGEST_RANK:
        return False  # not known, so not promised
    noise = torch.randn(1, hidden, ci, *k1, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    return int(torch.linalg.matrix_rank(dense_system(noise, k2)[0])) == columns


def exact_side(frame: Frame, co: int, ci: int, hidden: int) -> Side | None:
    """The kernel for which one half-step is exact (Claim 1), F2 before F1; None if neither."""
    return next((side for side in SIDES if half_step_is_exact(frame, co, ci, hidden, side=side)), None)


def smallest_half_step(frame: Frame, co: int, ci: int) -> int:
    """The smallest C_hid for which one half-step is exact, on either side."""
    n = tap_count(frame.size)
    hidden = min(-(-ci * n // tap_count(frame.second)), -(-co * n // tap_count(frame.first)))
    while exact_side(frame, co, ci, hidden) is None:
        hidden += 1
    return hidden


def freedom(frame: Frame, co: int, ci: int, hidden: int) -> int:
    """Unknowns less the gauge (an invertible C_hid x C_hid matrix) less equations; negative: no exact answer in general."""
    unknowns = hidden * (ci * tap_count(frame.first) + co * tap_count(frame.second)) - hidden**2
    return unknowns - co * ci * tap_count(frame.size)


def smallest_by_counting(frame: Frame, co: int, ci: int) -> int | None:
    """The smallest C_hid at which the unknowns, less the gauge, reach the number of equations; None if none does.

    The gauge makes the count fall again beyond half the unknowns per channel, where Claim 1 has long taken over.
    """
    per_channel = ci * tap_count(frame.first) + co * tap_count(frame.second)
    discriminant = per_channel**2 - 4 * co * ci * tap_count(frame.size)
    if discriminant < 0:
        return None
    guess = max(1, math.floor((per_channel - math.sqrt(discriminant)) / 2) - 1)
    while freedom(frame, co, ci, guess) < 0:
        guess += 1
    return guess


def smallest_direct(frame: Frame, co: int, ci: int) -> int | None:
    """The smallest C_hid with a closed form for any weight; None if the weight fits into neither kernel.

    It is the rank that a weight can have as a matrix, (C_out, C_in * |K|) in F1 or (C_out * |K|, C_in) in F2.
    """
    taps = tap_count(frame.kernel)
    options = [min(co, ci * taps)] * frame.fits(within_first=True) + [min(ci, co * taps)] * frame.fits(within_first=False)
    return min(options, default=None)


def smallest_dense(frame: Frame, co: int, ci: int) -> int:
    """The smallest C_hid that takes no iteration and leaves both kernels without zeros; the weight in F1 where that fits.

    A closed form is dense from two pairs of cancelling channels on. A half-step always is.
    """
    for within_first, channels in ((True, co), (False, ci)):
        if frame.fits(within_first=within_first):
            return channels + 4
    return smallest_half_step(frame, co, ci)


def smallest_exact(frame: Frame, co: int, ci: int) -> int:
    """The smallest C_hid that can be exact for any weight: by closed form, by Claim 1, or where the counting bound allows."""
    options = [smallest_half_step(frame, co, ci), smallest_direct(frame, co, ci), smallest_by_counting(frame, co, ci)]
    floor = min(co, ci)  # the rank of a general weight at any frequency
    return min(max(option, floor) for option in options if option is not None)


def numerical_rank(values: Tensor, relative: float) -> Tensor:
    """Smallest rank that leaves at most `relative` of the Frobenius norm, from (B, n) singular values, -> (B,) int64."""
    left = tail_norms(values)
    return (left[:, :-1] > relative * left[:, :1]).sum(-1)


def tail_norms(values: Tensor) -> Tensor:
    """Norm of what each rank from 0 to n leaves of a matrix with the singular values (B, n), -> (B, n + 1) float64."""
    return torch.nn.functional.pad(values.double().square().flip(-1).cumsum(-1).flip(-1).sqrt(), (0, 1))


def may_have_rank(matrix: Tensor, rank: int, relative: float) -> bool:
    """Whether all of (B, m, n) may have this `numerical_rank` or a lower one; where not, no factorisation need be tried.

    A random range finder (Halko, Martinsson and Tropp 2011): what its subspace misses is the least that any can miss, times
    some tens at most. That costs products, where singular values cost some twenty times more.
    """
    generator = torch.Generator().manual_seed(0)
    # One column fewer than would span everything.
    draw = torch.randn(matrix.shape[2], min(rank + _OVERSAMPLED, min(matrix.shape[1:]) - 1), generator=generator, device="cpu")
    basis, _ = torch.linalg.qr(matrix @ draw.to(matrix))
    missed = frobenius(matrix - basis @ (basis.mT @ matrix))
    return bool((missed <= _MISSED * relative * frobenius(matrix)).all())


def refuse_below_rank(weight: Tensor, hidden: int, frame: Frame) -> None:
    """Raise MorphError where the weights (B, Co, Ci, *K) have a rank that no composition through C_hid channels has.

    At each frequency z the composition is a product of matrices, G(z) = F2(z) F1(z), of rank C_hid at most. The rank of G(z)
    is the same for almost every z, so one odd frequency shows it.
    """
    co, ci = weight.shape[1:3]
    if hidden >= min(co, ci) or not len(weight):
        return
    value = weight.to(torch.complex128)
    for dim, size in enumerate(weight.shape[3:]):
        angle = torch.arange(size, dtype=torch.float64, device=weight.device) * (math.sqrt(2.0) + dim)
        phase = torch.polar(torch.ones_like(angle), angle)
        value = torch.tensordot(value, phase, dims=([3], [0]))
    rank = int(numerical_rank(torch.linalg.svdvals(value), 0.5 * tolerance(weight.dtype)).max())
    if rank > hidden:
        raise MorphError(
            f"hidden_channels={hidden} is too few: the weight has rank {rank} across its channels, which no composition "
            f"through {hidden} channels has; the smallest number that can be exact is {smallest_exact(frame, co, ci)}. "
            f"allow_inexact=True gives the nearest answer."
        )
