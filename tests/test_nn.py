"""The layers a morph inserts: exact at birth, learnable, portable, and exact again once folded."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastmorph.errors import MorphError
from fastmorph.nn import (
    ActivationSchedule,
    BatchNormLast,
    PActivation,
    PReLU,
    activation_penalty,
    fold_activations,
    identity_batch_norm,
)

# fmt: off
NAMES = [
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "logsigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink",
    "softsign", "tanh", "tanhshrink",
]
# fmt: on
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def set_a(module, *values):
    with torch.no_grad():
        module.a.copy_(torch.tensor(values))
    return module


def layers(*activations):
    """A Linear, then each activation and a Linear after it, on 4 features, with weights of a fixed seed."""
    modules = [nn.Linear(4, 4)]
    for activation in activations:
        modules += [activation, nn.Linear(4, 4)]
    model = nn.Sequential(*modules)
    with torch.no_grad():
        for seed, parameter in enumerate(p for m in model if isinstance(m, nn.Linear) for p in m.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return model


# --- the value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_birth_is_the_identity_for_every_finite_input(name, channels, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    bound = torch.finfo(dtype).max / 8  # the docstring promises finite activations up to a sixth
    values = data.draw(st.lists(st.floats(-bound, bound), min_size=6, max_size=6))
    x = torch.tensor(values, dtype=torch.float64).to(dtype).view(2, 3, 1)
    y = PActivation(name, channels=channels).to(dtype)(x)
    assert y.dtype == dtype
    assert torch.equal(y, x)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (2, 3, 4, 2)])
@pytest.mark.parametrize(("fn", "oracle"), [("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0)), (torch.sin, np.sin)])
def test_value_is_the_mix_along_dim_1(fn, oracle, shape):
    a = np.array([0.25, -0.5, 1.5])
    x = randn(*shape, dtype=torch.float64)
    along = a.reshape(1, 3, *[1] * (len(shape) - 2))
    expected = (1 - along) * oracle(x.numpy()) + along * x.numpy()
    module = set_a(PActivation(fn, channels=3).double(), *a)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 5, 3)])
def test_one_a_takes_any_shape(shape):
    x = randn(*shape)
    y = PActivation("gelu", a=0.5)(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, 0.5 * F.gelu(x) + 0.5 * x)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (3, 1), (1, 2, 3)])
def test_channels_elsewhere_than_in_dim_1_raise(shape):
    with pytest.raises(RuntimeError, match="3 channels needs them in dim 1"):
        PActivation("gelu", channels=3)(randn(*shape))
    with pytest.raises(RuntimeError, match=r"parameter numbers = 3|zero-dim"):  # PyTorch's own rule, for PReLU
        PActivation("relu", channels=3)(randn(*shape))


@pytest.mark.parametrize("fn", ["tanh", "relu", nn.PReLU(3).double()])
@pytest.mark.parametrize("channels", [None, 3])
def test_gradients(fn, channels):
    module = PActivation(fn, a=0.7, channels=channels).double()
    x = randn(4, 3, 2, dtype=torch.float64).requires_grad_()
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("name", NAMES)
def test_a_learns_from_birth(name):
    """At a = 1 the output hides fn; the gradient of a must not."""
    module, x = PActivation(name).double(), randn(7, 3, dtype=torch.float64)
    module(x).sum().backward()
    expected = (x - getattr(F, name)(x)).sum()
    torch.testing.assert_close(module.a.grad, expected.view(1))
    assert expected != 0


def test_train_and_eval_agree():
    module, x = PActivation("silu", a=0.3), randn(4, 3)
    assert torch.equal(module.train()(x), module.eval()(x))


# --- what fn may be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn", ["relu", nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu]
)
def test_relu_in_any_spelling_is_torch_prelu(fn):
    module = PActivation(fn, a=0.25, channels=2)
    assert isinstance(module, PReLU)
    assert isinstance(module, nn.PReLU)
    assert isinstance(module, PActivation)
    plain = nn.PReLU(2)
    plain.load_state_dict(set_a(module, 0.1, 0.2).state_dict())
    x = randn(3, 2, 4)
    before = x.clone()
    assert torch.equal(module(x), plain(x))
    assert torch.equal(x, before)
    assert isinstance(PActivation(fn=fn), nn.PReLU)


class Mine(PActivation):
    pass


def test_others_are_not_prelu():
    assert type(Mine("relu")) is Mine
    for fn in ("gelu", nn.ReLU6(), F.gelu, nn.PReLU()):
        assert not isinstance(PActivation(fn), nn.PReLU)
    with pytest.raises(MorphError, match="use PActivation"):
        PReLU("gelu")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_pytorchs_function_are_the_same(name):
    x = randn(9, dtype=torch.float64) * 4
    expected = getattr(F, name)(x)
    for fn in (name, getattr(F, name), lambda x: getattr(F, name)(x)):
        assert torch.equal(PActivation(fn, a=0.0).double()(x), expected)


@pytest.mark.parametrize(
    "fn",
    [
        F.elu_,
        torch.tanh_,
        torch.Tensor.sigmoid_,
        nn.SiLU(inplace=True),
        nn.Sequential(nn.Tanh(), nn.Mish(inplace=True)),
    ],
)
def test_in_place_activations_leave_the_input_alone(fn):
    given_inplace = [getattr(m, "inplace", None) for m in fn.modules()] if isinstance(fn, nn.Module) else None
    x = randn(6)
    before, expected = x.clone(), fn(x.clone())
    y = PActivation(fn, a=0.0)(x)
    assert torch.equal(x, before)
    assert torch.equal(y, expected)
    if given_inplace is not None:  # the caller's own module is not rewritten
        assert [getattr(m, "inplace", None) for m in fn.modules()] == given_inplace


class Snake(nn.Module):
    """An activation with a parameter a channel, of which fastmorph knows nothing."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.rand(3, 1))

    def forward(self, x):
        return x + (self.rate * x).sin() ** 2


def test_a_module_is_a_submodule():
    snake = Snake()
    module = PActivation(snake, a=0.0)
    assert module.fn is snake
    assert set(module.state_dict()) == {"a", "fn.rate"}
    x = randn(2, 3, 4)
    assert torch.equal(module(x), snake(x))


def test_trying_a_module_does_not_change_it():
    random = nn.RReLU()  # random in train mode alone
    module, x = PActivation(random), randn(50)
    assert module.fn is random
    assert random.training
    assert torch.equal(module(x), x)


class Rescale(nn.Module):
    def forward(self, x):
        return x / x.norm()


@pytest.mark.parametrize(
    ("fn", "cause"),
    [
        ("softmax", "'softmax' .* not elementwise"),
        ("glu", "not elementwise"),
        (nn.Softmax(dim=1), r"Softmax\(dim=1\) .* not elementwise"),
        (nn.GLU(dim=1), r"not elementwise, it turns shape \(2, 4, 3\) into \(2, 2, 3\)"),
        (functools.partial(F.softmax, dim=0), "not elementwise"),
        (Rescale(), "not elementwise"),
        (lambda x: x.flip(0), "not elementwise"),
        (nn.LayerNorm(3), "LayerNorm is not elementwise"),
        (nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), "Linear is not elementwise"),
        (lambda x: x.mul_(2), "in place"),
        (torch.log, "not finite at x = -3"),
        (nn.GELU, "returns a GELU, not a tensor"),
        (torch.mm, "failed on a tensor .* TypeError"),
        (3, "not a name, a module or a function"),
        (None, "not a name, a module or a function"),
        ("gleu", "no activation named 'gleu'; did you mean .*'gelu'"),
        ("LeakyReLU", "did you mean 'leaky_relu'"),
        ("xyz", r"no activation named 'xyz'\. "),
    ],
)
def test_unusable_activations_are_refused_with_cause_and_remedy(fn, cause):
    with pytest.raises(MorphError, match=cause) as caught:
        PActivation(fn)
    assert "Pass one of celu, elu, gelu" in str(caught.value)


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_no_channels_are_refused(name):
    with pytest.raises(MorphError, match="at least one channel, not 0"):
        PActivation(name, channels=0)


# --- what PyTorch does with modules ---------------------------------------------------------------

KINDS = ["gelu", "relu", nn.Hardtanh(-2, 2), F.softplus, torch.sin, Snake()]


@pytest.mark.parametrize("fn", KINDS, ids=lambda fn: getattr(fn, "__name__", None) or str(fn))
def test_copies_pickles_and_state_dicts_round_trip(fn):
    module, x = set_a(PActivation(fn, channels=3), 0.1, 0.2, 0.3), randn(2, 3, 4)
    other = PActivation(copy.deepcopy(fn), channels=3)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is type(module)
        assert twin.a is not module.a
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("fn", ["gelu", "relu", torch.sin], ids=lambda fn: getattr(fn, "__name__", None) or str(fn))
def test_compiles_as_one_graph(fn, channels):
    torch.compiler.reset()
    module, x = PActivation(fn, a=0.3, channels=channels), randn(2, 3, 4)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for m in (module, compiled):
        m(x).square().sum().backward()
    assert torch.equal(compiled(x), module(x))
    torch.testing.assert_close(compiled.a.grad, module.a.grad)


@pytest.mark.parametrize("fn", ["gelu", "relu"])
def test_fx_traces_it(fn):
    model, x = nn.Sequential(nn.Conv1d(3, 3, 1), PActivation(fn, a=0.3, channels=3)), randn(2, 3, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_onnx_export_computes_the_same():
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = nn.Sequential(
        nn.Conv1d(2, 3, 1),
        PActivation("silu", a=0.3, channels=3),
        PActivation("relu", a=0.4),
        PActivation(torch.sin, 0.2),
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            model, (randn(2, 2, 5),), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    onnx.checker.check_model(program.model_proto)
    x = randn(4, 2, 5, seed=1)  # another batch size than at export
    evaluator = ReferenceEvaluator(program.model_proto)
    (y,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach())


@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_the_parents_values_and_dtype(name, channels):
    """a stays float32 there; the output must still be what the layer before gave, in its dtype."""
    parent = layers()
    x = randn(3, 4)
    child = nn.Sequential(parent, PActivation(name, channels=channels))
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = parent(x), child(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected)


# --- to a = 0 -------------------------------------------------------------------------------------


def test_penalty_is_over_our_own_activations_once_each():
    shared = set_a(PActivation("relu", channels=4), 0.0, 1.0, 2.0, 1.0)
    model = layers(shared, nn.PReLU(init=7.0), set_a(PActivation("gelu"), 0.5), shared)
    penalty = activation_penalty(model)
    assert penalty.item() == 6 / 4 + 0.25
    penalty.backward()
    assert torch.equal(shared.a.grad, shared.a.detach() / 2)
    assert model[3].weight.grad is None
    assert activation_penalty(layers(nn.PReLU())).item() == 0


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedule_goes_from_where_a_stands_to_exactly_zero(shape, halfway, dtype):
    model = layers(PActivation("relu", channels=4), PActivation("gelu", a=0.5), nn.PReLU()).to(dtype)
    schedule = ActivationSchedule(model, 4, shape)
    seen = [1.0]
    for _ in range(6):
        schedule.step()
        seen.append(model[1].a[2].item())
        torch.testing.assert_close(model[3].a.item(), seen[-1] / 2, rtol=1e-2, atol=0)
    quarter = 0.25 if shape == "linear" else (1 - np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(seen[:4], [1, 1 - quarter, halfway, quarter], rtol=1e-2)
    assert seen[4:] == [0.0, 0.0, 0.0]
    assert model[5].weight.item() == 0.25  # the network's own PReLU


def test_schedule_holds_a_against_the_optimizer():
    model = layers(PActivation("relu"), PActivation("gelu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    def train():
        optimizer.zero_grad()
        model(randn(5, 4)).square().sum().backward()
        optimizer.step()

    model(randn(5, 4)).square().sum().backward()  # a gradient left over from before the schedule
    schedule = ActivationSchedule(model, 2)
    optimizer.step()
    assert model[1].a.item() == model[3].a.item() == 1
    schedule.step()
    before = model[0].weight.clone()
    train()
    assert model[1].a.item() == model[3].a.item() == 0.5
    assert not torch.equal(model[0].weight, before)


def test_schedule_resumes():
    first = layers(PActivation("relu", a=0.8), PActivation("gelu", channels=4))
    schedule = ActivationSchedule(first, 5, "cosine")
    schedule.step()
    schedule.step()
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "schedule": schedule.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    second = layers(PActivation("relu"), PActivation("gelu", channels=4))
    second.load_state_dict(saved["model"])
    resumed = ActivationSchedule(second, 99)
    resumed.load_state_dict(saved["schedule"])
    for _ in range(4):
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)
        schedule.step()
        resumed.step()
    assert not second[1].a.any()
    with pytest.raises(MorphError, match="not the model's"):
        ActivationSchedule(layers(PActivation("relu")), 5).load_state_dict(saved["schedule"])


def test_schedule_refuses_what_it_cannot_do():
    with pytest.raises(MorphError, match="no P-activation"):
        ActivationSchedule(layers(nn.PReLU()), 5)
    with pytest.raises(MorphError, match="at least one step, not 0"):
        ActivationSchedule(layers(PActivation("relu")), 0)
    with pytest.raises(MorphError, match="not 'step'"):
        ActivationSchedule(layers(PActivation("relu")), 5, "step")


def test_fold_is_exact_and_leaves_the_model_alone():
    hardtanh, own = nn.Hardtanh(-2, 2), nn.PReLU(init=0.0)
    fns = ["relu", "gelu", hardtanh, torch.sin, "silu"]
    model = layers(*(PActivation(fn, a=float(fn == "silu"), channels=4) for fn in fns), own)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(module) for module in model]
    folded = fold_activations(model)
    assert [type(m) for m in folded][1:10:2][:3] == [nn.ReLU, nn.GELU, nn.Hardtanh]
    assert folded[5].min_val == -2
    assert type(folded[9]) is nn.Identity
    assert type(folded[11]) is nn.PReLU
    assert not any(isinstance(m, PActivation) for m in folded.modules())
    x = randn(50, 4) * 3
    assert torch.equal(folded(x), model(x))
    assert [type(module) for module in model] == types
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not set(map(id, folded.parameters())) & set(map(id, model.parameters()))


def test_fold_keeps_sharing_and_mode_and_reaches_the_root():
    shared = PActivation("relu", a=0.0)
    model = nn.ModuleDict({"x": nn.Sequential(shared, shared), "y": nn.ModuleList([shared]), "z": None}).eval()
    folded = fold_activations(model)
    assert folded["x"][0] is folded["x"][1] is folded["y"][0]
    assert type(folded["x"][0]) is nn.ReLU
    assert not any(module.training for module in folded.modules())
    assert type(fold_activations(PActivation("gelu"))) is nn.Identity
    assert not fold_activations(PActivation("gelu").eval()).training
    nested = fold_activations(PActivation(PActivation("tanh", a=0.0), a=0.0))
    assert type(nested) is nn.Tanh


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_fold_refuses_the_unfinished(name):
    for values in ((0, 0, 0, 1), (0, 0, 1e-30, 0), (0, float("nan"), 0, 0), (-1, -1, -1, -1)):
        model = layers(PActivation("tanh"), set_a(PActivation(name, channels=4), *values))
        with pytest.raises(MorphError, match=r"3 is unfinished, its a lies in \["):
            fold_activations(model)
        kept = fold_activations(model, strict=False)
        assert type(kept[1]) is nn.Identity
        assert type(kept[3]) is type(model[3])
        assert kept[3] is not model[3]
    small = layers(set_a(PActivation(name, channels=4), 0.0, 1e-3, -1e-3, 0.0))
    assert type(fold_activations(small, atol=2e-3)[1]) in (nn.ReLU, nn.GELU)
    with pytest.raises(MorphError, match=r"\[-0.001, 0.001\]"):
        fold_activations(small, atol=5e-4)
    with pytest.raises(MorphError, match="the model is unfinished"):
        fold_activations(PActivation(name, a=0.5))


# --- batch norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 3), (2, 3, 3, 3)])
def test_batch_norm_last_is_batch_norm_with_the_channels_moved(shape):
    last, plain = BatchNormLast(3).double(), nn.BatchNorm1d(3).double()
    x = randn(*shape, dtype=torch.float64) * 2 + 1
    for mode in (True, False):
        y = last.train(mode)(x)
        expected = plain.train(mode)(x.flatten(0, -2).T[None].contiguous())[0].T.reshape(shape)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[key], value)
    assert torch.equal(last(x[(0,) * (x.ndim - 1)]), last(x)[(0,) * (x.ndim - 1)])  # no leading dimension at all


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_batch_norm_is_the_identity_in_eval(dtype, eps):
    channels = 4096
    mean, var = randn(channels, dtype=torch.float64) * 5, randn(channels, seed=1, dtype=torch.float64).square() * 10
    norm = nn.BatchNorm1d(channels, eps=eps, dtype=dtype).eval()
    assert identity_batch_norm(norm, mean, var) is norm
    # The variance as the norm holds it, its root in float64, one rounding; PyTorch's float64 root is good to 1 ulp.
    root = torch.from_numpy(np.sqrt(var.to(dtype).numpy().astype(np.float64) + eps)).to(dtype)
    torch.testing.assert_close(norm.weight.detach(), root, rtol=2.3e-16 if dtype == torch.float64 else 0, atol=0)
    assert torch.equal(norm.running_mean, mean.to(dtype))
    x = (randn(8, channels, seed=2, dtype=torch.float64) * var.sqrt() + mean).to(dtype)
    # Roundings of the scale, the shift and their sum: measured 2.3 eps, at the scale of the larger of x and mean.
    size = torch.maximum(x.abs(), mean.to(dtype).abs())
    assert ((norm(x) - x).abs() / size).max() < 4 * torch.finfo(dtype).eps
    assert norm.weight.requires_grad
    assert norm.weight.is_leaf
    assert norm.weight.grad_fn is None


@pytest.mark.parametrize("norm", [BatchNormLast(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)])
def test_identity_batch_norm_at_birth(norm):
    nn.init.normal_(norm.weight)
    identity_batch_norm(norm)
    shape = (2, 3, 3, 3, 3)[: {BatchNormLast: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}[type(norm)]]
    x = randn(*shape)
    torch.testing.assert_close(norm.eval()(x), x, rtol=3e-7, atol=0)
    assert norm.weight[0].item() == np.float32(np.sqrt(1 + norm.eps))
    with torch.device("meta"):  # as for the architecture alone, without weights
        assert identity_batch_norm(nn.BatchNorm2d(3)).weight.is_meta


@pytest.mark.parametrize(
    ("norm", "statistics", "cause"),
    [
        (nn.BatchNorm1d(3, affine=False), {}, "affine=True"),
        (nn.BatchNorm1d(3, track_running_stats=False), {}, "track_running_stats=True"),
        (nn.BatchNorm1d(3), {"mean": torch.zeros(2)}, r"shape \(3,\)"),
        (nn.BatchNorm1d(3), {"var": torch.ones(1, 3)}, r"shape \(3,\)"),
        (nn.BatchNorm1d(3), {"var": -1.0}, "not negative"),
        (nn.BatchNorm1d(3), {"mean": float("nan")}, "finite"),
        (nn.BatchNorm1d(3).half(), {"var": 1e6}, "finite in torch.float16"),
    ],
)
def test_identity_batch_norm_refuses(norm, statistics, cause):
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(MorphError, match=cause):
        identity_batch_norm(norm, **statistics)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
