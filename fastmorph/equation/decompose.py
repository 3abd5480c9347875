"""The network morphism equation: `compose` is its right-hand side, `decompose` solves it.

    G[o, i, u] = sum over h, v of F2[o, h, v] * F1[h, i, u - v]

with G padded by zeros to the frame N = K1 + K2 - 1 (Wei et al. 2016, Section 3; `frame.py` for where G stands in it).
Groups and depthwise layers are a batch of independent equations of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastmorph.equation.arithmetic import exact_arithmetic
from fastmorph.equation.arrays import to_tensor
from fastmorph.equation.backends import find_backend
from fastmorph.equation.decomposition import Array, Decomposition
from fastmorph.equation.problem import Problem, check, check_dims, check_rank
from fastmorph.equation.randomness import Generator, draw_seed
from fastmorph.equation.solve import accepted, look_at, solve_alike
from fastmorph.equation.solvers import Auto, Solver
from fastmorph.errors import MorphError


@exact_arithmetic()
def compose(first: Any, second: Any, *, spatial_dims: int = 2, backend: str | None = None) -> Any:
    """Full convolution of two kernels: the one kernel that acts as `first` followed by `second`. Differentiable.

    Args:
        first: F1, (*B, Ch, Ci, *K1), floating point; tensor, numpy array or DLPack exporter.
        second: F2, (*B, Co, Ch, *K2), of the same kind, dtype and device.
        spatial_dims: number of spatial dimensions, 0 (linear layers) to 3.
        backend: "numpy", "torch" or "triton"; None chooses, and takes "torch" where a gradient is asked for.

    Returns:
        (*B, Co, Ci, *(K1 + K2 - 1)), of the same kind, dtype and device; low-precision products are summed in float32 or
        better.

    Raises:
        MorphError: shapes that do not fit each other, a dtype that is not floating point, an unusable backend, or one
            through which no gradient flows where it is asked for.
    """
    dims = check_dims(spatial_dims)
    one, restore = to_tensor(first, "first")
    two, _ = to_tensor(second, "second")
    check_rank(one, dims, "first", "(*B, C_hid, C_in, *K1)")
    check_rank(two, dims, "second", "(*B, C_out, C_hid, *K2)")
    if one.dtype != two.dtype or one.device != two.device:
        raise MorphError(
            f"first is {one.dtype} on {one.device} and second {two.dtype} on {two.device}; convert one to match the other."
        )
    cut1, cut2 = one.ndim - dims - 2, two.ndim - dims - 2
    if one.shape[:cut1] != two.shape[:cut2] or one.shape[cut1] != two.shape[cut2 + 1]:
        raise MorphError(
            f"first {tuple(one.shape)} and second {tuple(two.shape)} do not chain with {dims} spatial dimension(s): batch "
            f"dimensions must be equal, and first's C_hid (dimension {cut1}) must be second's (dimension {cut2 + 1})."
        )
    batch = one.shape[:cut1]
    tracked = torch.is_grad_enabled() and (one.requires_grad or two.requires_grad)
    if tracked and backend not in (None, "torch"):
        raise MorphError(f"no gradient flows through backend={backend!r}; leave it out, or call detach() on the kernels.")
    chosen = find_backend("torch" if tracked else backend, one)
    one, two = one.reshape(-1, *one.shape[cut1:]), two.reshape(-1, *two.shape[cut2:])
    out = chosen.compose(one, two)
    return restore(out.reshape(*batch, *out.shape[1:]))


@torch.no_grad()
@exact_arithmetic()
def decompose(
    weight: Array,
    hidden_channels: int,
    kernel_sizes: Sequence[int | Sequence[int]] = (3, 3),
    *,
    spatial_dims: int = 2,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    precision: str | None = None,
    generator: Generator = None,
    allow_inexact: bool = False,
) -> Decomposition[Array]:
    """Split a layer's weight into two kernels whose full convolution it is, exactly. No gradient flows through: it is detached.

    Args:
        weight: G, (*B, Co, Ci, *K), floating point; tensor, numpy array or DLPack exporter.
        hidden_channels: C_hid, channels between the two layers.
        kernel_sizes: (K1, K2), each an int or one int per spatial dimension, K1 + K2 - 1 >= K; without meaning where
            `spatial_dims` is 0.
        spatial_dims: number of spatial dimensions, 0 (linear layers) to 3.
        solver: `Auto()`, `Direct()`, `General()`, `Practical()` or a `Solver` of your own.
        backend: "numpy" (the float64 reference), "torch" or "triton"; None chooses: "triton" on CUDA devices, if installed.
        precision: how products are taken: "float64", or for weights of 32 bits or fewer, in float32: "ieee" in full, with
            backend "triton" also "tf32x3" (as three of tf32) or "tf32" (exact for the short dtypes only). None: float64, but
            "tf32x3" for the closed form by kernel.
        generator: a seed, or a torch or numpy generator, for the noise that the free entries start from; None: torch's global
            one. The same seed gives the same answer.
        allow_inexact: return an answer that is not exact instead of raising.

    Returns:
        A Decomposition with kernels of the weight's kind, dtype and device, solved as `precision` says.

    Raises:
        MorphError: unusable input, kernels larger than the device's memory, a call inside torch.func's transforms, or no exact
            answer exists for this many hidden channels.
        InexactMorphError: the solver's answer is not exact (see `fastmorph.tolerance`); it carries the answer.
    """
    problem = check(
        Problem(weight, hidden_channels, kernel_sizes, spatial_dims),
        solver=solver,
        backend=backend,
        precision=precision,
        allow_inexact=allow_inexact,
    )
    ((outcome,),) = look_at([solve_alike([problem], [draw_seed(generator)])])
    return accepted(outcome, allow_inexact=allow_inexact)
