"""P-activations: exact at birth, learnable, portable."""

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
from modules import DTYPES, layers, randn, set_a
from torch import nn

from fastmorph.errors import MorphError
from fastmorph.nn import (
    PActivation,
    PReLU,
)

# fmt: off
NAMES = [
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "logsigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink",
    "softsign", "tanh", "tanhshrink",
]
# fmt: on


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
