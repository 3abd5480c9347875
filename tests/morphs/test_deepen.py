"""`deepen`: the whole output map is preserved, at every setting of a layer; what cannot be preserved is refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import fastmorph as fm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@st.composite
def convolutions(draw):
    """A convolution with any settings, an input that it takes, and kernel sizes to split it into."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    kernel = tuple(draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims)) if padding != "same" else 1
    torch.manual_seed(draw(st.integers(0, 2**31)))
    conv = CONVS[dims - 1](
        *channels,
        kernel,
        stride=stride,
        padding=tuple(draw(st.integers(0, 2)) for _ in range(dims)) if padding == "numbers" else padding,
        dilation=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    first = tuple(max(1, k + draw(st.integers(-1, 1))) for k in kernel)
    second = tuple(max(k - a + 1, draw(st.integers(1, 3))) for k, a in zip(kernel, first, strict=True))
    x = torch.randn(draw(st.integers(1, 2)), channels[0], *(draw(st.integers(7, 10)) for _ in range(dims)), dtype=torch.float64)
    return conv, x, (first, second)


def run(module, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        return module(x)


def relative_error(child, parent, x):
    with torch.no_grad():
        before, after = run(parent, x), run(child, x)
    assert before.shape == after.shape
    return float((after - before).abs().max() / before.abs().max())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=convolutions(), activation=st.sampled_from([None, "relu", "gelu"]), norm=st.sampled_from([None, "batch"]))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_every_convolution_keeps_its_whole_map(dtype, bound, case, activation, norm):
    conv, x, sizes = case
    conv, x = conv.to(dtype), x.to(dtype)
    try:
        run(conv, x)
    except RuntimeError:
        assume(False)  # an input smaller than the kernel, or than reflection needs
    child = fm.deepen(conv, "", kernel_sizes=sizes, activation=activation, norm=norm).eval()
    assert relative_error(child, conv, x) <= bound


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4)),
    lead=st.lists(st.integers(1, 3), max_size=3),
    bias=st.booleans(),
    activation=st.sampled_from([None, "relu", "tanh"]),
    norm=st.sampled_from([None, "batch"]),
)
def test_every_linear_layer_is_kept(sizes, lead, bias, activation, norm):
    inputs, outputs, extra = sizes
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    child = fm.deepen(linear, "", hidden_channels=outputs + extra, activation=activation, norm=norm).eval()
    assert relative_error(child, linear, torch.randn(*lead, inputs, dtype=torch.float64)) <= 1e-9


def test_the_border_is_where_a_naive_split_fails():
    """The equation holds, but padding the hidden map as one would by habit loses what lies beyond the border."""
    conv = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    child = fm.deepen(conv, "", hidden_channels=12, solver=fm.General(max_iter=1))
    assert relative_error(child, conv, x) <= 1e-9
    child.first.padding = child.second.padding = (1, 1)
    assert relative_error(child, conv, x) > 0.01


def test_stride_is_taken_early_where_the_second_kernel_is_one_wide():
    conv = nn.Conv2d(3, 4, 3, stride=(2, 3))
    child = fm.deepen(conv, "", kernel_sizes=(3, (1, 3)))
    assert child.first.stride == (2, 1)
    assert child.second.stride == (1, 3)


class Network(nn.Module):
    """A shared layer, a residual sum, batch norm, a frozen layer and one in train mode among others in eval mode."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.alias = self.shared
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.Conv2d(8, 8, 1)])
        self.head = nn.Linear(8, 5)
        self.stem.requires_grad_(False)
        self.eval()
        self.norm.train()

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.alias(torch.relu(self.shared(x)))
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().double()


@pytest.mark.parametrize("layer", ["stem", "shared", "alias", "blocks.0", "blocks.1", "head"])
def test_layers_of_a_network(network, layer):
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    child = fm.deepen(network, layer, activation="relu")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert child.norm.training
    assert not child.head.training
    assert child.alias is child.shared
    assert type(child) is Network
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert fm.verify(network, child, x, modes=("eval", "train")), fm.verify(network, child, x)


def test_frozen_layers_stay_frozen_and_names_elsewhere_stay(network):
    child = fm.deepen(network, "stem")
    assert not any(parameter.requires_grad for parameter in child.stem.parameters())
    assert set(network.state_dict()) - set(child.state_dict()) == {"stem.weight", "stem.bias"}
    assert set(child.state_dict()) - set(network.state_dict()) == {
        "stem.first.weight",
        "stem.second.weight",
        "stem.second.bias",
    }


def test_a_child_can_be_deepened_again(network):
    child = fm.deepen(fm.deepen(network, "stem", activation="relu"), "stem.first", activation="gelu")
    assert fm.verify(network, child, torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_hooks_survive_on_the_new_module(network):
    calls = []
    network.head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    child = fm.deepen(network, "head")
    child(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert calls == [(2, 5)]


def test_a_tied_bias_stays_tied(network):
    network.blocks[1].bias = network.stem.bias
    child = fm.deepen(network, "blocks.1")
    assert child.blocks[1].second.bias is child.stem.bias


def test_the_seed_decides_the_child(network):
    generators = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    one, two, other = (fm.deepen(network, "stem", hidden_channels=12, generator=generator) for generator in generators)
    assert torch.equal(one.stem.first.weight, two.stem.first.weight)
    assert not torch.equal(one.stem.first.weight, other.stem.first.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(network, dtype):
    child = fm.deepen(network.to(dtype), "shared", activation="relu", norm="batch")
    assert {parameter.dtype for parameter in child.parameters()} == {dtype}


@pytest.mark.parametrize("channels", [12, None])
def test_defaults(channels):
    child = fm.deepen(nn.Conv2d(4, 8, 7, padding=3), "", hidden_channels=channels)
    assert child.first.out_channels == (channels or 16)
    assert (child.first.kernel_size, child.second.kernel_size) == ((7, 7), (3, 3))
    depthwise = fm.deepen(nn.Conv2d(8, 8, 3, groups=8), "", kernel_sizes=(2, 2))
    assert depthwise.first.out_channels % 8 == 0
    assert depthwise.second.groups == 8


@pytest.mark.parametrize(
    ("layer", "sizes", "hidden"),
    [
        (nn.Conv2d(4, 8, 3), None, 16),  # C_out + 4 = 12
        (nn.Conv2d(4, 12, 3), None, 16),
        (nn.Conv2d(4, 13, 3), None, 24),
        (nn.Conv2d(4, 12, 3), (1, 3), 8),  # the weight is in the second kernel: C_in + 4
        (nn.Conv2d(64, 64, 3), None, 72),
        (nn.Conv2d(8, 16, 3, groups=2), None, 24),  # 2 (8 + 4)
        (nn.Conv2d(6, 9, 3, groups=3), None, 24),  # 3 (3 + 4) = 21, a multiple of 8 and of 3
        (nn.Conv2d(11, 11, 3, groups=11), None, 55),  # 11 (1 + 4), of many groups alone
        (nn.Linear(64, 64), None, 72),
        (nn.Conv2d(64, 64, 1), None, 72),
    ],
)
def test_the_default_is_the_smallest_that_is_dense(layer, sizes, hidden):
    child = fm.deepen(layer, "", kernel_sizes=sizes, generator=0)
    assert len(child.first.weight) == hidden
    assert all(bool((part.weight != 0).all()) for part in (child.first, child.second))


def test_the_history_has_the_sizes_that_the_default_came_to():
    parent = nn.Sequential(nn.Conv2d(4, 8, 5), nn.Flatten(), nn.Linear(8, 8))
    grown = fm.morph(parent, [fm.Deepen("0", activation="relu"), fm.Deepen("2", 12)])
    assert grown.history.operators == (
        fm.Deepen("0", 16, ((5, 5), (3, 3)), activation="relu"),
        fm.Deepen("2", 12),
    )
    again = fm.morph(parent, fm.Plan.from_toml(grown.history.to_toml()))
    assert all(torch.equal(a, b) for a, b in zip(grown.model.parameters(), again.model.parameters(), strict=True))
    assert again.history == grown.history


def test_an_activation_module_is_copied_into_each_child():
    fn = nn.PReLU()
    plan = fm.Plan([fm.Deepen("", activation=fn)])
    one, two = (fm.morph(nn.Linear(3, 3).double(), plan).model for _ in range(2))
    assert one.activation.fn.weight is not two.activation.fn.weight
    assert (fn.weight.dtype, one.activation.fn.weight.dtype) == (torch.float32, torch.float64)


# --- batch norm ------------------------------------------------------------------------------------------------------


def test_an_inserted_norm_is_exact_in_eval_and_calibrated_in_train(network):
    batch = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    plain = fm.deepen(network, "shared", norm="batch")
    calibrated = fm.deepen(network, "shared", norm="batch", calibrate=[batch])
    assert fm.verify(network, plain, batch)
    assert fm.verify(network, calibrated, batch)
    norm = calibrated.shared.norm
    torch.testing.assert_close(norm.weight, (norm.running_var + norm.eps).sqrt())
    torch.testing.assert_close(norm.bias, norm.running_mean)


def test_calibration_is_exact_in_train_mode_on_the_calibration_batch():
    conv = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)).double()
    batch = torch.randn(16, 3, 9, 9, dtype=torch.float64)
    child = fm.deepen(conv, "0", norm="batch", calibrate=[batch])
    assert fm.verify(conv, child, batch, modes=("eval", "train"))
    plain = fm.deepen(conv, "0", norm="batch")
    assert not fm.verify(conv, plain, batch, modes=("train",))
    split = fm.deepen(conv, "0", norm="batch", calibrate=batch.split([3, 5, 8]), generator=torch.Generator().manual_seed(0))
    whole = fm.deepen(conv, "0", norm="batch", calibrate=[batch], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(split[0].norm.running_var, whole[0].norm.running_var)


def test_calibration_needs_a_norm_and_batches():
    linear = nn.Linear(3, 3)
    with pytest.raises(fm.MorphError, match="norm"):
        fm.deepen(linear, "", calibrate=[torch.randn(4, 3)])
    with pytest.raises(fm.MorphError, match="batch"):
        fm.deepen(linear, "", norm="batch", calibrate=[])


# --- refusals --------------------------------------------------------------------------------------------------------


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.project = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.project.weight = self.embed.weight


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.order = [self.conv]


@pytest.mark.parametrize(
    ("model", "layer", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "conv", "no layer 'conv'"),
        (Listed(), "cnv", "did you mean 'conv'"),
        (nn.Sequential(nn.ReLU()), "0", "it is a ReLU"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "0", "it is a ConvTranspose2d"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "0", "lazy"),
        (nn.Sequential(prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)), "0", "prune.remove"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64)), "0", "complex64"),
        (nn.Sequential(OwnForward(3, 4, 3)), "0", "OwnForward has a forward of its own"),
        (Tied(), "project", "tied to 'embed.weight'"),
        (Listed(), "conv", "attribute 'order'"),
        (nn.MultiheadAttention(8, 2), "out_proj", "MultiheadAttention"),
        (nn.TransformerEncoderLayer(8, 2, 16), "linear1", "TransformerEncoderLayer"),
        (torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager"), "_orig_mod.0", "compiled"),
    ],
)
def test_what_cannot_be_preserved_is_refused_by_name(model, layer, words):
    with pytest.raises(fm.MorphError) as caught:
        fm.deepen(model, layer)
    assert words in str(caught.value)
    assert layer in str(caught.value) or "_orig_mod" in layer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_channels": 3}, "multiple of the layer's 2 groups"),
        ({"hidden_channels": 2}, "each of its 2 groups"),
        ({"hidden_channels": 0}, "positive int"),
        ({"kernel_sizes": (1, 2)}, "smaller than the weight"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"activation": "rellu"}, "rellu"),
        ({"activation": nn.Softmax(dim=1)}, "Softmax"),
    ],
)
def test_impossible_arguments_name_the_layer(options, words):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    weight = model[0].weight.detach().clone()
    with pytest.raises(fm.MorphError) as caught:
        fm.deepen(model, "0", **options)
    assert words in str(caught.value)
    assert torch.equal(model[0].weight, weight)


def test_an_inexact_morph_raises_and_leaves_the_parent():
    model = nn.Sequential(nn.Conv2d(8, 8, 5))
    with pytest.raises(fm.InexactMorphError, match="layer '0'") as caught:
        fm.deepen(model, "0", hidden_channels=16, kernel_sizes=(3, 3), solver=fm.General(max_iter=1))
    assert caught.value.decomposition.first.shape == (1, 16, 8, 3, 3)
    assert isinstance(model[0], nn.Conv2d)
