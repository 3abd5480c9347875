"""The closed form of the morphism equation as a registered operator, and the validated function in front of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import Precision, check_precision, check_tensors
from ..noise import Keys
from ..register import register
from ..support import accumulator, six_dimensional, three
from .balance import Balance, Scale, balance_of
from .mixing import dealing_table, groups_of, mixing_table
from .plain import Room, fill_factor, in_a_range, noise_of

_SAMPLE = 32  # channels on each side, twice as many at most, from which the spread of a weight is taken


def direct(
    weight: Tensor,
    hidden_channels: int,
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    seed: int | Tensor,
    *,
    density: float = 1.0,
    precision: Precision = "tf32x3",
    into_first: bool = True,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two layers that compute what one does, by a closed form: the solution of the morphism equation

        sum over h, v of second[b, o, h, v] * first[b, h, i, u - v] = weight[b, o, i, u - before]

    where the whole weight fits into one of the two kernels (Wei et al., "Network Morphism", ICML 2016, has the equation).

        first = P [S; S; s; G],   second = [R | -R | 0 | D] P^T

    G is the weight, D a unit matrix at one tap, S, s and R noise that cancels, P orthogonal over the hidden channels. Or, by
    transposition, G is in `second` and D in `first`. Both are exact to rounding, have the same expected standard deviation,
    and no zeros where there are at least four extra channels. G is read once, or twice where there are fewer pairs
    of extra channels than blocks of 32 hidden channels; the factors are written once; nothing of their size is allocated.

    Noise follows from an item's seed and shape alone, not from the batch, and is the same with and without Triton, so that
    answers agree to rounding (`noise`: the weight's factor has draw 0 under the seed, the delta's draw 1). The first call for a
    shape makes small tables, so that a CUDA graph must not hold it. Not differentiable.

    Args:
        weight: (B, Co, Ci, *K), 0 to 3 spatial dimensions, any strides; float32, float64, bfloat16 or float16.
        hidden_channels: Ch, at least Co (at least Ci where not `into_first`).
        k1: K1, one size for each spatial dimension, at least K where `into_first`.
        k2: K2, likewise, at least K where not `into_first`.
        before: zeros in front of the weight in the frame, from 0 to K1 + K2 - 1 - K.
        seed: that of item 0, and one more for each item after it; or (B,) int64 of seeds, on the weight's device.
        density: root mean square, in (0, 1], that noise gives to each tap of the kernel that has D, relative to what D gives to
            its tap. Rounding grows with it.
        precision: how float32 products are taken, also those of 16-bit weights. `tf32` is no longer exact in float32. Where
            there are no such units, and in float64, products are taken in full.
        into_first: whether the weight goes into `first`.
        spread: (B,) root mean square of S and s; None: that of the weight, as a sample of at most 63 x 63 channels has it.

    Returns:
        first: (B, Ch, Ci, *K1), second: (B, Co, Ch, *K2), contiguous, of the dtype and on the device of the weight.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: sizes, `before`, `density`, `precision`, `seed` or `spread` are not as they must be.
    """
    check_equation(weight, hidden_channels, k1, k2, before, density, precision, into_first)
    batch = len(weight)
    seeds = seed if isinstance(seed, Tensor) and seed.ndim else torch.arange(batch, device=weight.device) + seed
    if seeds.dtype != torch.int64:
        raise TypeError(f"seed must be an int or int64, but it is {seeds.dtype}: convert with .to().")
    for given, tensor in {"seed": seeds, "spread": weight.new_empty(batch) if spread is None else spread}.items():
        if tensor.shape != (batch,) or tensor.device != weight.device:
            raise ValueError(
                f"{given} must have one entry for each of {batch} items, on {weight.device}, but it has shape "
                f"{tuple(tensor.shape)} and is on {tensor.device}."
            )
    first, second = _direct_op(
        weight, hidden_channels, list(k1), list(k2), list(before), seeds, spread, density, precision, into_first
    )
    return first, second


def check_equation(
    weight: Tensor,
    hidden_channels: int,
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    density: float,
    precision: str,
    into_first: bool,
) -> None:
    """Raise TypeError or ValueError unless there is a closed form."""
    check_tensors("direct", weight=weight)
    check_precision(precision)
    if not 3 <= weight.ndim <= 6:
        raise ValueError(
            f"direct needs weight (B, Co, Ci, *K) with 0 to 3 spatial dimensions, but it has shape {tuple(weight.shape)}: "
            "add missing dimensions with unsqueeze()."
        )
    _, co, ci, *k = weight.shape
    if not len(k1) == len(k2) == len(before) == len(k):
        raise ValueError(
            f"weight has {len(k)} spatial dimensions, but k1 is {tuple(k1)}, k2 {tuple(k2)} and before {tuple(before)}: "
            "each must have one entry for each."
        )
    name, outer, other, needed = ("k1", k1, k2, co) if into_first else ("k2", k2, k1, ci)
    if any(a < b for a, b in zip(outer, k, strict=True)) or 0 in k or any(n < 1 for n in other):
        raise ValueError(
            f"a weight of size {tuple(k)} must fit into {name} = {tuple(outer)}, and no size may be 0: "
            f"enlarge {name}, or put the weight into the other kernel with into_first={not into_first}."
        )
    if hidden_channels < needed:
        raise ValueError(
            f"hidden_channels = {hidden_channels}, but a weight {tuple(weight.shape)} needs at least {needed} where "
            f"into_first={into_first}: raise it."
        )
    if any(not 0 <= zeros <= a + b - 1 - n for zeros, a, b, n in zip(before, k1, k2, k, strict=True)):
        raise ValueError(
            f"before = {tuple(before)} does not lie in the frame: each entry must be from 0 to K1 + K2 - 1 - K, "
            f"for K1 = {tuple(k1)}, K2 = {tuple(k2)} and K = {tuple(k)}."
        )
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density = {density} must lie in (0, 1].")
    if max(ci * math.prod(k1), co * math.prod(k2)) >= 2**31 - 2**16:
        raise ValueError("a factor has 2**31 columns (channels times taps) or nearly so, which are not counted: split it.")


def _allocate(
    weight: Tensor,
    hidden_channels: int,
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    seeds: Tensor,
    spread: Tensor | None,
    density: float,
    precision: str,
    into_first: bool,
) -> tuple[Tensor, Tensor]:
    batch, co, ci = weight.shape[:3]
    return weight.new_empty((batch, hidden_channels, ci, *k1)), weight.new_empty((batch, co, hidden_channels, *k2))


class Factor(NamedTuple):
    """One of the factors to fill, its hidden channels in front."""

    given: Tensor | None  # the weight, (B, rows, columns, *K), or None for the factor that has the delta
    out: Tensor
    start: list[int]  # where the weight, or the delta's one tap, stands among the factor's taps


def factors_of(
    out: tuple[Tensor, Tensor], weight: Tensor, before: Sequence[int], density: float, into_first: bool
) -> tuple[tuple[Factor, Factor], Balance]:
    """The factor that has the weight, and the delta's; and how their noise and sizes are balanced."""
    weight, one, two = six_dimensional(weight), six_dimensional(out[0]), six_dimensional(out[1]).transpose(1, 2)
    if not into_first:
        weight, one, two = weight.transpose(1, 2), two, one
    # The middle tap, or the nearest to it that leaves the weight inside the other kernel.
    centre = [
        min(max((k2 - 1) // 2, zeros - (k1 - k)), zeros)
        for zeros, k1, k2, k in zip(three(before), one.shape[3:], two.shape[3:], weight.shape[3:], strict=True)
    ]
    start = [zeros - tap for zeros, tap in zip(three(before), centre, strict=True)]
    return (Factor(weight, one, start), Factor(None, two, centre)), balance_of(weight, one, two, density)


def sample_of(weight: Tensor) -> Tensor:
    """The entries of a weight (B, rows, columns, *K) whose root mean square is that of the noise in its factor."""
    rows, columns = weight.shape[1:3]
    return weight[:, :: max(1, rows // _SAMPLE), :: max(1, columns // _SAMPLE)]


def _spread(weight: Tensor, spread: Tensor | None, dtype: torch.dtype, queued: bool) -> Scale:
    """The root mean square of each item's noise in the factor of the weight, (B, 1, 1) of `dtype`; that of one is read."""
    if spread is None:
        sample = sample_of(weight)
        norms = torch.linalg.vector_norm(sample, dim=tuple(range(1, weight.ndim)), dtype=dtype)
        spread = norms.mul_(max(1, math.prod(sample.shape[1:])) ** -0.5)
    return float(spread) if len(spread) == 1 and not queued else spread.to(dtype).view(-1, 1, 1)


def _plain(
    out: tuple[Tensor, Tensor],
    weight: Tensor,
    hidden: int,
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    seeds: Tensor,
    spread: Tensor | None,
    density: float,
    precision: str,
    into_first: bool,
) -> None:
    keys = seeds.numpy().view(np.uint64)
    fill_plainly(out, weight, before, keys, density=density, into_first=into_first, spread=spread)


def fill_plainly(
    out: tuple[Tensor, Tensor],
    weight: Tensor,
    before: Sequence[int],
    keys: Keys,
    *,
    density: float,
    into_first: bool,
    spread: Tensor | None = None,
    left: Tensor | None = None,
    work: torch.dtype = torch.float64,
    queued: bool = False,
) -> None:
    """Fill both factors as `direct` does, in plain PyTorch on any device; nothing is checked.

    Args:
        out: first and second, of any strides.
        weight, before, density, into_first, spread: as in `direct`.
        keys: (B,) the seeds.
        left: U, (B, Co, r), where `weight` is V, (B, r, Ci, *K), of a weight U V; (B, Ci, r) and (B, Co, r, *K) of its
            transpose where not `into_first`.
        work: what is computed in.
        queued: whether to read a value is to wait for a device.
    """
    held, room = weight.shape[1 if into_first else 2], Room(weight, work)
    factors, balance = factors_of(out, weight, before, density, into_first)
    scales, extra = balance.scales(_spread(weight, spread, work, queued)), out[0].shape[1] - held
    columns = max(math.prod(factor.out.shape[2:]) for factor in factors)
    few = columns * extra * len(weight) <= in_a_range(weight.device)
    noise = noise_of(keys, extra // 2, extra % 2, columns if few else 0, room)
    for (given, factor, start), own, rows in zip(factors, scales, noise, strict=True):
        source = left.mT[..., None, None, None] if given is None and left is not None else given
        fill_factor(source, factor, held, start, rows, own, room, delta=given is None, work=work)


def _launch(
    out: tuple[Tensor, Tensor],
    weight: Tensor,
    hidden: int,
    k1: Sequence[int],
    k2: Sequence[int],
    before: Sequence[int],
    seeds: Tensor,
    spread: Tensor | None,
    density: float,
    precision: str,
    into_first: bool,
) -> None:
    from .launch import launch_direct, launch_scales, launch_sums

    dtype, device, held = accumulator(weight.dtype), weight.device, weight.shape[1 if into_first else 2]
    if len(weight) == 0:  # an empty grid is an error
        return
    if dtype == torch.float64 or torch.version.hip is not None:
        precision = "ieee"
    seeds, spread = seeds.contiguous(), None if spread is None else spread.contiguous()
    tables = (mixing_table(dtype, device), dealing_table(hidden, held, device))
    sums, groups = None, groups_of(hidden, held)
    factors, balance = factors_of(out, weight, before, density, into_first)
    scales = weight.new_empty((2, len(weight), 2), dtype=dtype)
    launch_scales(sample_of(six_dimensional(weight)), spread, balance, scales)
    for (given, factor, start), own in zip(factors, scales, strict=True):
        if factor.numel() == 0:
            continue
        if given is not None and groups:
            sums = factor.new_empty((len(factor), groups, 2, math.prod(factor.shape[2:])), dtype=dtype)
            launch_sums(given, sums, factor.shape[3:], start, tables[1])
        launch_direct(given, None if given is None else sums, factor, held, start, tables, seeds, own, precision=precision)


_direct_op = register("direct", allocate=_allocate, launch=_launch, plain=_plain)
