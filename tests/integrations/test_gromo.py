"""GroMo's growth step for all layers at once: the same updates and neurons as its own loop, and as an oracle in numpy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators
from fastmorph.integrations import gromo

pytest.importorskip("gromo", reason="gromo is not installed (requirements-others.txt)")
pytestmark = pytest.mark.filterwarnings("ignore")
EPS = np.finfo(np.float64).eps


@pytest.fixture
def default_float64():
    """GroMo makes constants of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def statistics(layers, s, t, *, rank=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(s + t)
    inputs = torch.randn(layers, 3 * s, rank or s, generator=generator, dtype=torch.float64)
    if rank:
        inputs = inputs @ torch.randn(layers, rank, s, generator=generator, dtype=torch.float64)
    gradients = torch.randn(layers, 3 * s, t, generator=generator, dtype=torch.float64)
    return list((inputs.mT @ inputs / 3 / s).to(dtype)), list((inputs.mT @ gradients / 3 / s).to(dtype))


def oracle(covariance, moment, threshold=1e-6):
    """(S^-1 M)^T, the weights that all neurons add together, and the singular values, by numpy's eigh and svd."""
    s, m = covariance.double().numpy(), moment.double().numpy()
    values, vectors = np.linalg.eigh(s)
    kept = values > threshold
    root = vectors[:, kept] / np.sqrt(values[kept]) @ vectors[:, kept].T
    _, singular, _ = np.linalg.svd(root @ m, full_matrices=False)
    condition = values[kept].max() / values[kept].min()
    return (root @ root @ m).T, singular, 30 * len(s) * EPS * condition  # backward stable: an error of n eps, times cond(S)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [None, 7])
def test_updates_and_neurons_are_the_oracle_s(dtype, rank):
    shapes = [(9, 12), (12, 9), (9, 12)]
    pairs = [statistics(2, s, t, rank=rank, dtype=dtype) for s, t in shapes]
    covariances, moments = ([each for pair in pairs for each in pair[side]] for side in (0, 1))
    options = {"numerical_threshold": 1e-5, "statistical_threshold": 0.0}
    answers = zip(
        covariances,
        moments,
        gromo.optimal_deltas(covariances, moments),
        gromo.optimal_neurons(covariances, moments, **options),
        strict=True,
    )
    rounding = torch.finfo(dtype).eps if dtype == torch.float32 else 0.0  # the answer's own
    for s, m, (delta, decrease), (incoming, outgoing, values) in answers:
        expected, singular, bound = oracle(s, m, 1e-5)
        bound += 4 * rounding
        assert delta.dtype == incoming.dtype == outgoing.dtype == values.dtype == dtype
        assert np.linalg.norm(delta - expected) <= bound * np.linalg.norm(expected)
        assert float(decrease) == pytest.approx(np.vdot(m.double(), expected.T), rel=bound)
        assert np.linalg.norm(values - singular) <= bound * singular[0]
        together = outgoing.double() @ incoming.double()  # sum_k omega_k alpha_k = (S^-1 N)^T: no sign is free in it
        assert np.linalg.norm(together - expected) <= bound * np.linalg.norm(expected)


def test_each_neuron_is_gromo_s_own():
    from gromo.utils.tools import compute_optimal_added_parameters, optimal_delta

    covariances, moments = statistics(5, 10, 8)
    for options in (
        {},
        {"maximum_added_neurons": 3},
        {"statistical_threshold": 0.5},
        {"ignore_singular_values": True, "maximum_added_neurons": 2},
        {"numerical_threshold": 0.3},
        {"statistical_threshold": 1e9},
    ):
        for s, m, ours in zip(covariances, moments, gromo.optimal_neurons(covariances, moments, **options), strict=True):
            incoming, outgoing, values = compute_optimal_added_parameters(s, m, **options)
            bound = oracle(s, m)[2]
            gap = float((-torch.linalg.svdvals(m).diff()).min())  # vectors move by an error over the gap between their values
            assert ours.singular_values.shape == values.shape
            torch.testing.assert_close(ours.singular_values, values, rtol=bound, atol=0)
            sign = (ours.incoming * incoming).sum(-1).sign()
            torch.testing.assert_close(ours.incoming * sign[:, None], incoming, rtol=0, atol=bound / gap * 10)
            torch.testing.assert_close(ours.outgoing * sign, outgoing, rtol=0, atol=bound / gap * 10)
    for s, m, update in zip(covariances, moments, gromo.optimal_deltas(covariances, moments), strict=True):
        delta, decrease = optimal_delta(s, m, dtype=torch.float64)
        torch.testing.assert_close(update.delta, delta, rtol=0, atol=oracle(s, m)[2])
        torch.testing.assert_close(update.decrease, decrease, rtol=oracle(s, m)[2], atol=0)


def mlp():
    from gromo.containers.growing_mlp import GrowingMLP

    return GrowingMLP(6, 3, hidden_size=8, number_hidden_layers=4, activation=nn.GELU(), device="cpu"), torch.randn(40, 6)


def convolutions(kind):
    from gromo.containers.sequential_growing_container import SequentialGrowingModel
    from gromo.modules import conv2d_growing_module

    layer = getattr(conv2d_growing_module, kind)

    class Net(SequentialGrowingModel):
        def __init__(self):
            super().__init__(2, 3, "cpu")
            self.layers = nn.ModuleList()
            for inputs, outputs in ((2, 4), (4, 4), (4, 3)):
                self.layers.append(
                    layer(
                        inputs,
                        outputs,
                        3,
                        padding=1,
                        input_size=(6, 6),
                        post_layer_function=nn.GELU(),
                        device="cpu",
                        previous_module=self.layers[-1] if self.layers else None,
                        use_bias=inputs != 4 or outputs == 3,
                    )
                )
            self._growable_layers = list(self.layers[1:])
            self.set_growing_layers("all")

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

        def extended_forward(self, x, extension=None):
            for layer in self.layers:
                x, extension = layer.extended_forward(x, extension)
            return x

    return Net(), torch.randn(20, 2, 6, 6)


def with_statistics(make):
    torch.manual_seed(0)
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = make()
    model.init_computation()
    for part in x.split(10):
        model.zero_grad()
        model(3 * part).sin().square().sum().backward()  # gradients that no layer follows by itself
        model.update_computation()
    return model, x


@pytest.mark.parametrize(
    "make",
    [mlp, lambda: convolutions("RestrictedConv2dGrowingModule"), lambda: convolutions("FullConv2dGrowingModule")],
    ids=["linear", "restricted convolutions", "full convolutions"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"maximum_added_neurons": 2},
        {"maximum_added_neurons": 2, "compute_delta": False, "ignore_singular_values": True},
        {
            "maximum_added_neurons": 2, "compute_delta": False, "use_covariance": False, "alpha_zero": True,
            "use_projection": False, "ignore_singular_values": True,
        },
    ],
    ids=["natural gradient", "TINY", "GradMax"],
)  # fmt: skip
def test_a_network_takes_the_step_that_gromo_s_loop_takes(make, options, default_float64):
    options = {"numerical_threshold": 1e-4, "statistical_threshold": 0.0, **options}
    (theirs, x), (ours, _) = with_statistics(make), with_statistics(make)
    theirs.compute_optimal_updates(dtype=torch.float64, **options)
    gromo.compute_optimal_updates(ours, **options)
    for model in (theirs, ours):
        model.reset_computation()
        for layer in model.layers:
            layer.set_scaling_factor(0.5)
    with torch.no_grad():
        parent = theirs(x)
        assert torch.equal(ours(x), parent)  # nothing is applied yet
        assert options.get("alpha_zero") or not torch.allclose(ours.extended_forward(x), parent, rtol=1e-3)  # it is a step
    for mine, other in zip(ours._growing_layers, theirs._growing_layers, strict=True):
        torch.testing.assert_close(mine.first_order_improvement, other.first_order_improvement, rtol=1e-6, atol=0)
        torch.testing.assert_close(mine.eigenvalues_extension, other.eigenvalues_extension, rtol=1e-6, atol=0)
        assert (mine.optimal_delta_layer is None) == (other.optimal_delta_layer is None)
        outgoing = mine.extended_input_layer.weight, other.extended_input_layer.weight
        sign = (outgoing[0] * outgoing[1]).sum([0, *range(2, outgoing[0].ndim)]).sign().view(-1, *[1] * (outgoing[0].ndim - 2))
        torch.testing.assert_close(outgoing[0] * sign, outgoing[1], rtol=0, atol=1e-6)
        before = mine.previous_module.extended_output_layer, other.previous_module.extended_output_layer
        torch.testing.assert_close(before[0].weight * sign[:, None], before[1].weight, rtol=0, atol=1e-6)
        if before[0].bias is not None:
            torch.testing.assert_close(before[0].bias * sign.flatten(), before[1].bias, rtol=0, atol=1e-6)
        assert "_auxiliary_compute_alpha_omega" not in vars(mine)
    assert ours.select_best_update() == theirs.select_best_update() or options.get("alpha_zero")


def test_what_cannot_be_solved_is_named():
    covariances, moments = statistics(3, 4, 5)
    moments[1][2, 2] = torch.inf
    with pytest.raises(fm.MorphError, match="layer 1: its statistics are not finite"):
        gromo.optimal_deltas(covariances, moments)
    with pytest.raises(fm.MorphError, match="layer 2: S is \\(4, 4\\), which does not fit"):
        gromo.optimal_neurons(covariances, [moments[0], moments[2], moments[0].mT])
    with pytest.raises(fm.MorphError, match="maximum_added_neurons=-1"):
        gromo.optimal_neurons(covariances, moments, maximum_added_neurons=-1)
    with pytest.raises(fm.MorphError, match="is a Linear: only GroMo's growing modules"):
        gromo.compute_optimal_updates([nn.Linear(3, 3)])
