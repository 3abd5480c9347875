"""GroMo's growth step for many layers at once: its weight updates and its new neurons, from the statistics that GroMo gathered.

    model.init_computation()
    for x, y in data:
        loss(model(x), y).backward()
        model.update_computation()
    compute_optimal_updates(model, maximum_added_neurons=8)  # instead of model.compute_optimal_updates(...)

GroMo solves layer by layer. With S the second moments of a layer's inputs, and M, N their moments with the gradients, its
update is (S^-1 M)^T, and its new neurons come from the SVD of S^-1/2 N (Verbockhaven et al., "Growing Tiny Networks", 2024).
Here layers of one shape are solved together. Any W with W W^T = S^-1 stands in for S^-1/2: W^T N has the singular values and
the right singular vectors of S^-1/2 N, and W takes its left ones to the same weights. So W is the inverse of a Cholesky
factor, which costs a small part of an eigendecomposition; only layers some of whose eigenvalues are left out get one of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastmorph.errors import MorphError

_Answer = TypeVar("_Answer")


class Neurons(NamedTuple):
    """New neurons between two layers: `incoming` (k, s), `outgoing` (t, k), `singular_values` (k,), largest first."""

    incoming: Tensor
    outgoing: Tensor
    singular_values: Tensor


class Update(NamedTuple):
    """A change of a layer's weight, `delta` (t, s), and `decrease`, the loss's first-order decrease by it (a 0-d tensor)."""

    delta: Tensor
    decrease: Tensor


def optimal_deltas(covariances: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Update]:
    """The update (S^+ M)^T of each layer, solved in float64 and returned in the dtype of M.

    Args:
        covariances: S of each layer, (s, s), symmetric and positive semi-definite.
        moments: M of each layer, (s, t).

    S^+ is the inverse, or, where eigenvalues of S are no more than s * eps * ||S||_F, eps that of S's dtype, the
    pseudo-inverse without them.

    Raises MorphError: a layer's S or M has values that are not finite, or shapes that do not fit.
    """

    def solve(s: Tensor, m: Tensor) -> list[Update]:
        threshold = s.shape[-1] * torch.finfo(s.dtype).eps * torch.linalg.matrix_norm(s.double())
        root = _InverseRoot(s.double(), threshold)
        half = root.half(m.double())  # (b, s, t)
        deltas, decreases = root.back(half).mT.to(m.dtype), half.square().sum((-2, -1)).to(m.dtype)
        return list(map(Update, deltas, decreases))

    return _in_buckets(solve, covariances, moments)


def optimal_neurons(
    covariances: Sequence[Tensor] | None,
    moments: Sequence[Tensor],
    *,
    numerical_threshold: float = 1e-6,
    statistical_threshold: float = 1e-3,
    maximum_added_neurons: int | None = None,
    ignore_singular_values: bool = False,
) -> list[Neurons]:
    """The new neurons in front of each layer, from the SVD of S^-1/2 N, in float64 and returned in the dtype of N.

    Args:
        covariances: S of the layer before each, (s, s), symmetric and positive semi-definite; None for identities.
        moments: N of each layer, (s, t).
        numerical_threshold: eigenvalues of S up to this are left out.
        statistical_threshold: singular values below this are left out, the largest excepted.
        maximum_added_neurons: at most so many; None: all.
        ignore_singular_values: take each as 1 in the weights.

    The sign of a neuron is free, as in every SVD: that of its incoming and its outgoing weights together.

    Raises MorphError: a layer's S or N has values that are not finite, or shapes that do not fit; or maximum_added_neurons < 0.
    """
    if maximum_added_neurons is not None and maximum_added_neurons < 0:
        raise MorphError(f"maximum_added_neurons={maximum_added_neurons} must be None or at least 0.")

    def solve(s: Tensor | None, n: Tensor) -> list[Neurons]:
        root = None if s is None else _InverseRoot(s.double(), n.new_full((len(n),), numerical_threshold, dtype=torch.float64))
        left, values, right = _svd(n.double() if root is None else root.half(n.double()), precise=n.dtype == torch.float64)
        kept = (values >= values[:, :1].clamp(max=statistical_threshold)).sum(-1)
        counts = (kept if maximum_added_neurons is None else kept.clamp(max=maximum_added_neurons)).tolist()
        most = max(counts)
        left, values, right = left[..., :most], values[:, :most], right[..., :most]
        left = left if root is None else root.back(left)
        scale = torch.ones_like(values) if ignore_singular_values else values.sqrt()
        incoming, outgoing = (scale[:, None] * left).mT.to(n.dtype), (scale[:, None] * right).to(n.dtype)
        values = values.to(n.dtype)
        parts = zip(incoming.unbind(), outgoing.unbind(), values.unbind(), counts, strict=True)
        return [Neurons(a, b, c) if k == most else Neurons(a[:k], b[:, :k], c[:k]) for a, b, c, k in parts]

    return _in_buckets(solve, covariances, moments)


def compute_optimal_updates(
    layers: nn.Module | Iterable[nn.Module],
    *,
    numerical_threshold: float = 1e-6,
    statistical_threshold: float = 1e-3,
    maximum_added_neurons: int | None = None,
    update_previous: bool = True,
    compute_delta: bool = True,
    use_covariance: bool = True,
    alpha_zero: bool = False,
    omega_zero: bool = False,
    use_projection: bool = True,
    ignore_singular_values: bool = False,
) -> None:
    """What `compute_optimal_updates` of each of GroMo's layers does, with the same options, for all of them at once.

    Args:
        layers: GroMo's growing modules, or a container of them, with the statistics that GroMo gathered.
        **options: as in GroMo, whose documentation explains them.

    It sets what GroMo sets: `optimal_delta_layer`, `extended_input_layer`, `eigenvalues_extension`, the layer before's
    `extended_output_layer`, and the values that GroMo compares layers by. Solving is done in float64 whatever their dtype.

    Raises MorphError: a layer is not a growing module of GroMo's, or follows a merge; or as `optimal_neurons`.
    """
    from gromo.modules.growing_module import GrowingModule

    own = getattr(layers, "_growing_layers", layers)
    chosen: list[Any] = [own] if isinstance(own, nn.Module) and not isinstance(own, nn.ModuleList) else list(own)
    for layer in chosen:
        if not isinstance(layer, GrowingModule) or not isinstance(layer.previous_module, GrowingModule | None):
            raise MorphError(
                f"{getattr(layer, 'name', 'a layer')} is a {type(layer).__name__}: only GroMo's growing modules behind another "
                "one, or in front, are solved together; call its own compute_optimal_updates."
            )
    growing = [layer for layer in chosen if layer.previous_module is not None]
    for layer in chosen:
        layer.delta_raw, layer.optimal_delta_layer = None, None
        layer.parameter_update_decrease = torch.zeros((), device=layer.device, dtype=layer.weight.dtype)
    changed = chosen if compute_delta else growing if use_projection else []
    updates = optimal_deltas([layer.tensor_s() for layer in changed], [layer.tensor_m() for layer in changed])
    for layer, update in zip(changed, updates, strict=True):
        layer.delta_raw = update.delta  # N, which GroMo projects, reads it
        if compute_delta:
            weight, bias = (update.delta[:, :-1], update.delta[:, -1]) if layer.use_bias else (update.delta, None)
            layer.optimal_delta_layer = layer.layer_of_tensor(weight.reshape(layer.weight.shape), bias)
            layer.parameter_update_decrease = update.decrease
    neurons = optimal_neurons(
        [layer.tensor_s_growth() for layer in growing] if use_covariance else None,
        [layer.tensor_n if use_projection else -layer.tensor_m_prev() for layer in growing],
        numerical_threshold=numerical_threshold,
        statistical_threshold=statistical_threshold,
        maximum_added_neurons=maximum_added_neurons,
        ignore_singular_values=ignore_singular_values,
    )
    for layer, (incoming, outgoing, values) in zip(growing, neurons, strict=True):
        answer = incoming * (not alpha_zero), outgoing * (not omega_zero), values
        _extend(layer, answer, update_previous=update_previous)
        layer._first_order_uses_squared_singular_values = not ignore_singular_values


def _extend(layer: Any, answer: tuple[Tensor, Tensor, Tensor], *, update_previous: bool) -> None:
    """Let GroMo make the layers of new neurons, which differ from class to class, of an answer that is known."""
    layer._auxiliary_compute_alpha_omega = lambda **_: answer
    try:
        layer._compute_optimal_added_parameters(update_previous=update_previous)
    finally:
        del layer._auxiliary_compute_alpha_omega


def _in_buckets(
    solve: Callable[[Any, Tensor], list[_Answer]], covariances: Sequence[Tensor] | None, moments: Sequence[Tensor]
) -> list[_Answer]:
    """Solve all problems of one shape, dtype and device at once; answers in the order of the problems."""
    buckets: dict[Any, list[int]] = {}
    for place, moment in enumerate(moments):
        covariance = None if covariances is None else covariances[place]
        if covariance is not None and covariance.shape != (moment.shape[0],) * 2:
            raise MorphError(
                f"layer {place}: S is {tuple(covariance.shape)}, which does not fit the {tuple(moment.shape)} of M or N."
            )
        key = moment.shape, moment.dtype, moment.device, None if covariance is None else covariance.dtype
        buckets.setdefault(key, []).append(place)
    answers: dict[int, _Answer] = {}
    for places in buckets.values():
        m = torch.stack([moments[place].detach() for place in places])
        s = None if covariances is None else torch.stack([covariances[place].detach() for place in places])
        if not (m.sum() + (0 if s is None else s.sum())).isfinite():  # one of them, or their sum alone
            for place in places:
                if not all(part[place].isfinite().all() for part in (moments, covariances) if part is not None):
                    raise MorphError(
                        f"layer {place}: its statistics are not finite; look for the overflow in its activations or gradients."
                    )
        answers.update(zip(places, solve(s, m), strict=True))
    return [answers[place] for place in range(len(moments))]


class _InverseRoot:
    """W with W W^T the inverse of each S (b, s, s) on its eigenvalues above a threshold (b,)."""

    def __init__(self, s: Tensor, threshold: Tensor) -> None:
        shifted = s.clone()
        shifted.diagonal(dim1=-2, dim2=-1).sub_(threshold[:, None])
        # all eigenvalues are above the threshold just where S - threshold I has a Cholesky factor
        whole = torch.linalg.cholesky_ex(shifted).info == 0
        self.whole: Any = slice(None) if whole.all() else whole  # a slice copies nothing
        self.other: Any = slice(0) if whole.all() else ~whole
        self.lower = torch.linalg.cholesky(s[self.whole])  # W = L^-T
        values, vectors = torch.linalg.eigh(s[self.other])
        kept = values > threshold[self.other, None]
        self.rest = vectors * torch.where(kept, values, torch.inf).rsqrt()[:, None]  # W = V lambda^-1/2

    def half(self, m: Tensor) -> Tensor:
        """W^T M."""
        out = torch.empty_like(m)
        out[self.whole] = torch.linalg.solve_triangular(self.lower, m[self.whole], upper=False)
        out[self.other] = self.rest.mT @ m[self.other]
        return out

    def back(self, m: Tensor) -> Tensor:
        """W M."""
        out = torch.empty_like(m)
        out[self.whole] = torch.linalg.solve_triangular(self.lower.mT, m[self.whole], upper=True)
        out[self.other] = self.rest @ m[self.other]
        return out


def _svd(matrix: Tensor, *, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U (b, s, k), singular values (b, k), largest first, and V (b, t, k) of float64 matrices (b, s, t), k the smaller size.

    The Gram matrix of the smaller side takes half the time of an SVD, and errs by s * eps * sigma_1^2 / sigma_i in sigma_i.
    That is less than the rounding of statistics in float32, eps32 * sigma_1, for all above 1e-8 s * sigma_1; what is below
    is rounding of theirs. Statistics in float64 are `precise`, and take the SVD.
    """
    if precise:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right.mT
    if matrix.shape[-2] < matrix.shape[-1]:
        right, values, left = _svd(matrix.mT, precise=False)
        return left, values, right
    right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors.flip(-1)
    left = matrix @ right
    values = torch.linalg.vector_norm(left, dim=-2)
    return left / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None], values, right
