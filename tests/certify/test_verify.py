"""What `verify` must accept, refuse and leave alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from pairs import Apply, Cell, X, family, only, returning
from torch import Tensor, nn

from fastmorph.certify.run import isolated
from fastmorph.certify.verify import verify
from fastmorph.errors import MorphError


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch's default, set again in case another test has changed it."""
    kept = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = kept


# --- algebra and rounding ----------------------------------------------------------------------------------------


def test_an_exact_float64_child_holds_within_rounding() -> None:
    parent, child, x = family()
    certificate = verify(parent, child, x)
    assert certificate
    assert 0 < certificate.max_rel < 1e-14
    assert (certificate.dtype, certificate.tolerance, certificate.modes) == (torch.float64, 1e-9, ("eval",))
    assert only(certificate).max_abs == (child(x) - parent(x)).abs().max().item()
    assert certificate.verdict.startswith("HOLDS")


@pytest.mark.parametrize("error", [1e-6, 1e-8])
def test_a_small_error_in_one_weight_fails_in_float64(error: float) -> None:
    certificate = verify(*family(error))
    assert not certificate
    assert error / 1e3 < certificate.max_rel < error
    assert certificate.verdict.startswith("FAILS in algebra")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_alone_holds_and_is_told_from_algebra(dtype: torch.dtype) -> None:
    parent, child, x = family(dtype=dtype)
    certificate = verify(parent, child, x)
    own, exact = certificate.rows
    assert certificate
    assert certificate.dtype == dtype
    assert (own.precision, exact.precision) == (str(dtype).removeprefix("torch."), "float64")
    wide = deepcopy(parent).double()(x.double())
    assert own.noise == pytest.approx(((parent(x).double() - wide).abs().max() / wide.abs().max()).item())
    assert exact.noise is None
    eps = torch.finfo(dtype).eps
    assert eps / 100 < own.max_rel < 8 * eps  # rounding, and really measured in the own dtype
    assert eps / 100 < exact.max_rel < 4 * eps  # the weights of the copies keep the rounding of their dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_algebra_error_fails_in_low_precision_too(dtype: torch.dtype) -> None:
    certificate = verify(*family(error=1e-3 if dtype == torch.float32 else 10.0, dtype=dtype))
    assert not certificate
    assert certificate.verdict.startswith("FAILS in algebra")


def test_rounding_that_is_too_large_fails_but_not_in_algebra() -> None:
    # Adding and taking away 1e4 costs float32 its last three digits, and float64 nothing that matters.
    parent, _, x = family(dtype=torch.float32)
    certificate = verify(parent, nn.Sequential(parent, Apply(lambda y: (y + 1e4) - 1e4)), x)
    own, exact = certificate.rows
    assert not own.holds
    assert exact.holds
    assert not certificate
    assert certificate.verdict.startswith("FAILS in rounding, not in algebra")
    assert certificate.worst is own


def test_a_given_tolerance_holds_for_every_row() -> None:
    inexact = family(error=1e-3, dtype=torch.float32)
    assert verify(*inexact, tolerance=1e-2)
    assert not verify(*inexact, tolerance=1e-7)
    certificate = verify(*family(dtype=torch.float32), tolerance=0)
    assert [row.tolerance for row in certificate.rows] == [0, 0]
    assert not certificate
    parent, _, x = inexact
    assert verify(parent, deepcopy(parent), x, tolerance=0)


def test_mixed_dtypes_report_the_coarsest() -> None:
    parent, child, x = family(dtype=torch.bfloat16)
    heads = [Apply(lambda y: y.to(torch.get_default_dtype()), model) for model in (parent, child)]
    models = [nn.Sequential(head, nn.Linear(4, 2)) for head in heads]
    models[1][1] = models[0][1]
    certificate = verify(*models, x)
    assert certificate
    assert certificate.dtype == torch.bfloat16


def test_complex_weights_are_widened() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x) @ self.weight  # (3, 8) -> (3, 5), one dtype on both sides

    model, x = Spectral(), torch.randn(3, 8)
    certificate = verify(model, deepcopy(model), x)
    assert certificate
    assert certificate.dtype == torch.float32
    other = deepcopy(model)
    other.weight.data[0, 0] += 1e-2j
    assert not verify(model, other, x)


# --- what verify leaves alone --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tf32")
def test_models_inputs_and_generators_are_untouched_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Sequential(nn.Linear(8, 3)))
    model(torch.randn(4, 6)).sum().backward()
    model.train()
    model[1].eval()
    model[3].eval()
    model[0].bias.requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)

    def snapshot() -> list[Any]:
        tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers(), x]
        flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        numpy_state = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]  # noqa: NPY002
        settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cudnn.conv.fp32_precision
        kept = [None if t is None else t.detach().clone().tolist() for t in tensors]
        return [kept, flags, torch.get_rng_state().tolist(), torch.initial_seed(), random.getstate(), numpy_state, settings]

    child = Apply(lambda y: y + 0 * (random.random() + np.random.rand()), model)  # noqa: NPY002
    before = snapshot()
    assert verify(model, child, x, modes=("train", "eval"))
    assert snapshot() == before

    def broken(y: Tensor) -> Tensor:
        torch.rand(3), random.random()
        raise RuntimeError("a wall")

    with pytest.raises(MorphError, match=r"The child could not be run in train mode: RuntimeError: a wall"):
        verify(model, Apply(broken, model), x, modes=("train",))
    assert snapshot() == before


def test_train_mode_uses_batch_statistics_and_eval_mode_does_not_see_them() -> None:
    parent = nn.Sequential(nn.BatchNorm1d(6))
    child = deepcopy(parent)
    child[0].running_mean += 1.0  # plain to see in eval mode, unused in train mode
    x = torch.randn(8, 6) * 3
    certificate = verify(parent, child, x, modes=("train", "eval"))
    assert [row.holds for row in certificate.rows] == [True, True, False, False]
    assert certificate.worst.mode == "eval"
    # The eval rows compare the models as given: 1 / sqrt(var + eps) with var = 1, not what a train pass leaves.
    assert certificate.rows[2].max_abs == pytest.approx(1.0, rel=1e-4)


def test_dropout_coincides_when_drawn_in_the_same_order() -> None:
    parent, child, x = family(dtype=torch.float32)
    models = [nn.Sequential(model, nn.Dropout(0.5), nn.Dropout1d(0.5)) for model in (parent, child)]
    assert verify(*models, x, modes=("train",))
    extra_draw = nn.Sequential(nn.Dropout(0.5), *models[1])
    assert not verify(models[0], extra_draw, x, modes=("train",))
    assert verify(models[0], extra_draw, x, modes="eval").modes == ("eval",)


def test_python_and_numpy_draws_coincide() -> None:
    model = Apply(lambda y: y * random.random() * np.random.rand(), nn.Linear(6, 2))  # noqa: NPY002
    assert verify(model, deepcopy(model), torch.randn(3, 6))


@pytest.mark.usefixtures("tf32")
def test_runs_are_without_gradients_and_tf32_is_off_where_a_run_is_on_cuda_and_only_there() -> None:
    seen = []

    def look(y: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.backends.cudnn.conv.fp32_precision))
        return y

    assert verify(Apply(look), Apply(look), torch.ones(2))
    assert seen == [(False, "tf32")] * 4
    with isolated({"cuda"}):
        look(torch.ones(2))
    assert seen[-1] == (False, "ieee")
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_a_model_that_works_in_place_changes_no_input_of_another_run() -> None:
    model = Apply(lambda y: y.mul_(2).add_(1))
    x = torch.randn(3, 4)
    kept = x.clone()
    certificate = verify(model, Apply(lambda y: y * 2 + 1), x, tolerance=0)
    assert certificate
    assert torch.equal(x, kept)
    listed = [x]
    assert verify(Apply(lambda _, xs: xs.pop() + 1), Apply(lambda _, xs: xs[0] + 1), x, listed)
    assert len(listed) == 1
    cell = Cell(x)  # no tensor and no container to PyTorch
    assert verify(Apply(Cell.double), Apply(Cell.double), cell)
    assert cell.value is x


# --- inputs and refusals ---------------------------------------------------------------------------------------------


class Keywords(nn.Linear):
    def forward(self, *, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        return super().forward(x) + more["bias"][more["index"]]


def test_keyword_and_nested_inputs_reach_both_models_in_both_precisions() -> None:
    model, other = Keywords(3, 2), Keywords(3, 2)
    kwargs = {"x": X, "more": {"bias": torch.randn(4, 2), "index": torch.tensor([1, 3])}}
    certificate = verify(model, deepcopy(model), kwargs=kwargs)
    assert certificate
    assert [row.precision for row in certificate.rows] == ["float32", "float64"]
    assert not verify(model, other, kwargs=kwargs)


def test_tensors_that_forward_makes_follow_the_float64_copies() -> None:
    model = Apply(lambda y: y @ torch.ones(3, 2), nn.Linear(3, 3))
    assert verify(model, deepcopy(model), X)


def test_models_without_parameters_have_no_device() -> None:
    child = nn.Linear(3, 3)
    with torch.no_grad():
        child.weight.copy_(torch.eye(3))
        child.bias.zero_()
    assert verify(nn.Identity(), child, X)


class Float32Only(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class CannotBeCast(nn.Linear):
    def double(self) -> CannotBeCast:
        raise TypeError("quantised")


@pytest.mark.parametrize("kind", [Float32Only, CannotBeCast])
def test_a_model_that_fixes_float32_is_compared_all_the_same(kind: type[nn.Linear]) -> None:
    model = kind(3, 2)
    certificate = verify(model, deepcopy(model), X, tolerance=0)
    assert certificate
    assert [row.precision for row in certificate.rows] == ["float32", "float64"]
    assert not verify(model, kind(3, 2), X)


def test_a_model_that_cannot_be_float64_is_refused_in_a_sentence() -> None:
    def narrow(y: Tensor) -> Tensor:
        if y.dtype == torch.float64:
            raise TypeError("no kernel")
        return y

    with pytest.raises(MorphError, match=r"The float64 copy of the parent could not be run in eval mode: .*kernel.*dtype\."):
        verify(Apply(narrow), nn.Linear(3, 2), X)


def test_unusable_calls_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(MorphError, match=r"modes takes 'eval', 'train' or both, not \('test',\)"):
        verify(model, model, X, modes=("test",))
    with pytest.raises(MorphError, match="modes takes"):
        verify(model, model, X, modes=())
    with pytest.raises(MorphError, match="needs the inputs of one call"):
        verify(model, model)
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(MorphError, match="tolerance is a finite number"):
            verify(model, model, X, tolerance=tolerance)
    with pytest.raises(MorphError, match=r"The parent is on \['cpu'\], the child on \['meta'\]"):
        verify(model, nn.Linear(3, 2, device="meta"), X)
    with pytest.raises(MorphError, match="returned no tensor"):
        verify(returning(None), returning(None), X)
    with pytest.raises(MorphError, match="no default tolerance for float8_e4m3fn"):
        verify(model, model.to(torch.float8_e4m3fn), X)
