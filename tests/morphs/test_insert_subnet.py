"""`insert_subnet`: rows, branches and residual blocks compute what the layer did over its whole map, at every setting."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastmorph as fm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Each equation may miss 1e-10 of the weight (fm.tolerance); shares of a sum are a few times as large as the weight.
BOUND = 1e-8


def run(module, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        return module(x)


def assert_same(parent, child, x, bound=BOUND):
    with torch.no_grad():
        before, after = run(parent, x), run(child, x)
    torch.testing.assert_close(after, before, rtol=0, atol=bound * float(before.abs().max()))


@st.composite
def cases(draw):
    """A convolution with any settings, an input that it takes, and a subnet of rows that reach at least as far."""
    dims = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    conv = CONVS[dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(dims)) if padding != "same" else 1,
        padding=tuple(draw(st.integers(0, 2)) for _ in range(dims)) if padding == "numbers" else padding,
        dilation=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    hidden = 6 * groups * max(kernel) ** dims

    def row(whole):
        """A row of one to three layers; the first reaches over the whole kernel, or at random."""
        count = draw(st.integers(1, 3))
        sizes = [tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(count)]
        if whole:
            sizes[0] = tuple(map(max, sizes[0], kernel))
        activation, norm = draw(st.sampled_from([None, "relu", "tanh"])), draw(st.sampled_from([None, "batch"]))
        return fm.Sequential([(None if i == count - 1 else hidden, size, activation, norm) for i, size in enumerate(sizes)])

    branches = [row(whole=True), *(row(whole=False) for _ in range(draw(st.integers(0, 2))))]
    x = torch.randn(2, conv.in_channels, *(draw(st.integers(6, 9)) for _ in range(dims)), dtype=torch.float64)
    return conv, x, branches[0] if len(branches) == 1 else fm.Stacked(draw(st.permutations(branches)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_convolution_keeps_its_whole_map(case):
    conv, x, subnet = case
    try:
        run(conv, x)
    except RuntimeError:
        assume(False)  # an input smaller than the kernel, or than reflection needs
    child = fm.insert_subnet(conv, "", subnet).eval()
    assert_same(conv, child, x)
    biases = [p for name, p in child.named_parameters() if name.endswith("bias") and "layer" in name]
    assert len(biases) == (conv.bias is not None)


@pytest.mark.parametrize(
    "subnet",
    [
        fm.Sequential([(9, None, "gelu"), (8, None, "relu", "batch"), (None, None, None)]),
        fm.Stacked([fm.Sequential([(None, 1)]), fm.Sequential([(9, 1, "tanh"), (None, 1)]), fm.Skip()]),
        fm.Residual(6, norm="batch"),
    ],
)
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_linear_layers(subnet, lead):
    linear = nn.Linear(7, 7, dtype=torch.float64)
    assert_same(linear, fm.insert_subnet(linear, "", subnet).eval(), torch.randn(*lead, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, (5, 4), padding="same", dilation=(2, 1), groups=2, padding_mode="reflect"),
        nn.Conv1d(3, 3, 1, bias=False),
    ],
)
def test_a_skip_beside_convolutions(conv):
    conv, hidden = conv.double(), 8 * conv.in_channels
    subnet = fm.Stacked([fm.Skip(), fm.Sequential([(None, 1)]), fm.Sequential([(hidden, conv.kernel_size, "relu"), (None, 1)])])
    child = fm.insert_subnet(conv, "", subnet)
    assert type(child[0]) is nn.Identity
    x = torch.randn(2, conv.in_channels, *(7, 9)[: conv.weight.ndim - 2], dtype=torch.float64)
    assert_same(conv, child, x)


def test_every_new_weight_is_used():
    """No branch is given nothing, and no layer is an identity with zeros around it."""
    conv = nn.Conv2d(4, 6, 3, padding=1)
    rows = [fm.Sequential([(12, 3, "relu"), (10, 3, "relu"), (None, 1)]), fm.Sequential([(None, 1)])]
    child = fm.insert_subnet(conv, "", fm.Stacked(rows))
    for name, parameter in child.named_parameters():
        assert parameter.count_nonzero() > 0.9 * parameter.numel(), name
    child(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert all(parameter.grad.count_nonzero() for parameter in child.parameters())


def test_names_of_the_parts():
    child = fm.insert_subnet(nn.Conv1d(2, 3, 3), "", fm.Sequential([fm.LayerSpec(6, 3, "relu", "batch"), (None, 1, None)]))
    assert [name for name, _ in child.named_children()] == ["layer0", "norm0", "activation0", "layer1"]
    assert isinstance(fm.insert_subnet(nn.Conv1d(2, 2, 1), "", fm.Residual(2)).layer, nn.Conv1d)


# --- residual blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", torch.sin])
@pytest.mark.parametrize("size", [1, (3, 5), (2, 3)])
@pytest.mark.parametrize("mode", [True, False])
def test_a_residual_block_is_exact_in_both_modes(activation, size, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2, dtype=torch.float64), nn.ReLU()).train(mode)
    child = fm.insert_subnet(model, "0", fm.Residual(10, size, activation, "batch"))
    assert child[0].residual[1].training is mode
    # Twins are equal to the bit; they cancel up to the roundings of a sum of 10 * 15 products.
    assert_same(model, child, torch.randn(3, 4, 9, 8, dtype=torch.float64), bound=1e-13)
    first, second = child[0].residual[1].first.weight, child[0].residual[1].second.weight
    assert first.count_nonzero() == first.numel()
    assert second.count_nonzero() == second.numel()


def test_training_parts_the_twins():
    child = fm.insert_subnet(nn.Linear(3, 3), "", fm.Residual(4))
    optimizer = torch.optim.SGD(child.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        child(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
    first = child.residual[1].first.weight
    assert not torch.equal(first[:2], first[2:])


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "subnet", "words"),
    [
        (nn.ReLU(), fm.Residual(2), "it is a ReLU"),
        (nn.Conv2d(4, 4, 3, groups=2), fm.Sequential([(7, 3, None), (None, 1, None)]), "multiple of the layer's 2 groups"),
        (nn.Conv2d(4, 4, 3), fm.Sequential([(0, 3, None), (None, 1, None)]), "positive int"),
        (nn.Conv2d(4, 4, 3), fm.Sequential([(8, 2, None), (None, 1, None)]), "no branch reaches"),
        (nn.Conv2d(4, 4, 3), fm.Sequential([(8, (3, 3, 3), None), (None, 1, None)]), "nor 2 of them"),
        (nn.Conv2d(4, 4, 3), fm.Sequential([(2, 3, None), (None, 1, None)]), "2 is too few"),
        (nn.Conv2d(4, 4, 3), fm.Stacked([fm.Skip(), fm.Sequential([(None, 3)])]), "fm.Skip"),
        (nn.Conv2d(4, 4, 3, 2, 1), fm.Stacked([fm.Skip(), fm.Sequential([(None, 3)])]), "fm.Skip"),
        (nn.Conv2d(4, 8, 3, padding=1), fm.Stacked([fm.Skip(), fm.Sequential([(None, 3)])]), "(8 and 4)"),
        (nn.Conv2d(4, 4, 3), fm.Residual(4, activation=nn.PReLU(4)), "twins would not cancel"),
        (nn.Conv2d(4, 4, 3), fm.Residual(4, (3,)), "nor 2 of them"),
        (nn.Conv2d(4, 4, 3), [(8, 3)], "is not an fm.Sequential"),
    ],
)
def test_what_cannot_be_inserted_is_refused_by_name(layer, subnet, words):
    with pytest.raises(fm.MorphError, match="layer '0'") as caught:
        fm.insert_subnet(nn.Sequential(layer), "0", subnet)
    assert words in str(caught.value)


def test_an_equation_that_fails_says_which_it_is():
    row = fm.Sequential([(24, 3, None), (4, 1, None), (None, 1, None)])
    with pytest.raises(
        fm.MorphError, match=r"layer '', branch 1, kernel 1 of 3 \(each of its 2 groups\): hidden_channels=2 is too few"
    ):
        fm.insert_subnet(nn.Conv2d(12, 12, 3, groups=2), "", fm.Stacked([fm.Sequential([(None, 1)]), row]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fm.Sequential([]), "one entry a new layer"),
        (lambda: fm.Sequential([(4, 3, None)]), "None"),
        (lambda: fm.Sequential([(None, 3), (None, 3)]), "None"),
        (lambda: fm.Sequential([("4", 3), (None, 3)]), "must be an int"),
        (lambda: fm.LayerSpec(4, 3, norm="layer"), "norm='layer'"),
        (lambda: fm.Stacked([fm.Skip()]), "at most one"),
        (lambda: fm.Stacked([fm.Skip(), fm.Skip(), fm.Sequential([(None, 1)])]), "at most one"),
        (lambda: fm.Stacked([(None, 1)]), "fm.Sequential"),
        (lambda: fm.Residual(3), "even"),
        (lambda: fm.Residual(0), "even"),
        (lambda: fm.Residual(2, norm="group"), "norm='group'"),
        (lambda: fm.Residual(2, activation=None), "linear"),
    ],
)
def test_specs_that_say_nothing_are_refused(make, words):
    with pytest.raises(fm.MorphError) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 2.0**-560), (torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_a_weight_that_is_lost_beside_a_skip_is_refused(dtype, scale):
    model = nn.Conv2d(4, 4, 3, padding=1, dtype=dtype)
    model.weight.data *= scale
    subnet = fm.Stacked([fm.Skip(), fm.Sequential([(None, 3)])])
    with pytest.raises(
        fm.MorphError, match=r"so small beside the identity that torch\.float\d\d would lose .* leave the fm\.Skip"
    ):
        fm.insert_subnet(model, "", subnet, verify=False)
    fm.insert_subnet(model, "", subnet, verify=False, allow_inexact=True)
