"""What new channels begin with, and how an optimizer's moments follow."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from widening import FILLS, Net, randn, trained, widened

import fastmorph as fm


def perceptron(activation):
    return trained(nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 2)))


def test_pairs():
    child = widened(perceptron(nn.GELU()), {"0": 11}, randn(4, 3))
    rows, columns = child[0].weight[6:], child[2].weight[:, 6:]
    assert torch.equal(rows[:2], rows[2:4])
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(columns[:, :2], -columns[:, 2:4])
    assert torch.equal(columns[:, 4], torch.zeros(2, dtype=torch.float64))
    assert rows.abs().min() > 0
    assert columns[:, :4].abs().min() > 0


def test_zero_side():
    few_rows = widened(perceptron(nn.ReLU()), {"0": 8}, randn(4, 3), fill="zero")  # 2 rows of 3, 2 columns of 2
    assert few_rows[2].weight[:, 6:].abs().max() == 0
    assert few_rows[0].weight[6:].abs().min() > 0
    wide = trained(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)))
    few_columns = widened(wide, {"0": 8}, randn(4, 3), fill="zero")
    assert few_columns[0].weight[6:].abs().max() == few_columns[0].bias[6:].abs().max() == 0
    assert few_columns[2].weight[:, 6:].abs().min() > 0
    wide[1] = nn.Sigmoid()  # makes 0.5 of zero
    assert widened(wide, {"0": 8}, randn(4, 3), fill="zero")[2].weight[:, 6:].abs().max() == 0


def test_zero_rows_through_a_batch_norm():
    layers = [nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 1)]
    child = widened(trained(nn.Sequential(*layers)), {"0": 7}, randn(2, 2, 4, 4), fill="zero")
    assert child[0].weight[4:].abs().max() == child[1].running_mean[4:].abs().max() == child[1].bias[4:].abs().max() == 0
    assert child[1].running_var[4:].min() > 0


def tokens(between, **modules):
    """Channels of a narrow layer, something between, and a wide layer that reads them: fewer rows than columns."""

    def forward(m, x):
        return m.two(between(m, m.one(x)))

    return trained(Net(forward, one=nn.Linear(3, 4), two=nn.Linear(4, 9), **modules))


MAKES_OF_ZERO = {
    "constant padding": lambda m, h: nn.functional.pad(h, (0, 0, 1, 1), value=0.5),
    "ones like it": lambda m, h: h + torch.ones_like(h),
    "a position's parameter": lambda m, h: h + m.position,
    "a number": lambda m, h: h + 1,
    "one channel for all": lambda m, h: h + m.single(h),
    "a bias that mixes positions": lambda m, h: m.mix(h.transpose(1, 2)).transpose(1, 2),
    "a token of ones": lambda m, h: torch.cat([h, torch.ones_like(h[:, :1])], 1),
    "a chosen constant": lambda m, h: torch.where(h > 0, h, 0.5),
    "a softmax over positions": lambda m, h: h.softmax(1),
    "a power": lambda m, h: (h + 1e-3).abs() ** -0.5,
    "a layer norm of positions": lambda m, h: m.norm(h.transpose(1, 2)).transpose(1, 2),
}
KEEPS_ZERO = {
    "a gate": lambda m, h: h * torch.sigmoid(m.single(h)),
    "padding": lambda m, h: nn.functional.pad(h, (0, 0, 1, 1)),
    "a class token": lambda m, h: torch.cat([m.token.expand(len(h), 1, -1), h], 1),
    "a channel's parameter": lambda m, h: h + m.channel,
    "two branches": lambda m, h: torch.relu(h) + torch.tanh(h) * m.position,
    "a mean": lambda m, h: h - h.mean(1, keepdim=True),
    "mixed positions": lambda m, h: m.unbiased(h.transpose(1, 2)).transpose(1, 2),
    "a square": lambda m, h: h**2,
    "zeros like it": lambda m, h: torch.cat([h, torch.zeros_like(h[:, :1])], 1),
}


def parts():
    one = {"position": (5, 1), "channel": (4,), "token": (1, 1, 4)}
    layers = {
        "single": nn.Linear(4, 1),
        "mix": nn.Linear(5, 5),
        "unbiased": nn.Linear(5, 5, bias=False),
        "norm": nn.LayerNorm(5),
    }
    return {**{name: nn.Parameter(torch.ones(shape)) for name, shape in one.items()}, **layers}


def used(between):
    """The parts that the code names; what no run uses would not be widened past."""
    return {name: part for name, part in parts().items() if name in between.__code__.co_names}


@pytest.mark.parametrize("name", MAKES_OF_ZERO)
def test_zeros_that_become_something_are_read_by_zeros(name):
    between = MAKES_OF_ZERO[name]
    child = widened(tokens(between, **used(between)), {"one": 6}, randn(2, 5, 3), fill="zero")
    assert child.two.weight[:, 4:].abs().max() == 0
    assert child.one.weight[4:].abs().min() > 0


@pytest.mark.parametrize("name", KEEPS_ZERO)
def test_zeros_that_stay_zeros_are_made_by_zeros(name):
    between = KEEPS_ZERO[name]
    child = widened(tokens(between, **used(between)), {"one": 6}, randn(2, 5, 3), fill="zero")
    assert child.one.weight[4:].abs().max() == child.one.bias[4:].abs().max() == 0
    assert child.two.weight[:, 4:].abs().min() > 0


def test_duplicates():
    parent = perceptron(nn.ReLU())
    child = widened(parent, {"0": 12}, randn(4, 3), fill="duplicate")
    rows, total = child[0].weight, child[2].weight.sum(1)
    assert all(any(torch.equal(row, old) for old in rows[:6]) for row in rows[6:])
    assert len({tuple(row.tolist()) for row in rows[6:]}) > 1  # of several channels
    torch.testing.assert_close(total, parent[2].weight.sum(1), rtol=0, atol=1e-14)  # 12 numbers of size 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cancels_exactly(dtype):
    child = fm.widen(perceptron(nn.ReLU()).to(dtype), {"0": 10}, example_inputs=randn(4, 3).to(dtype), verify=False)
    columns = child[2].weight[:, 6:]
    assert torch.equal(columns[:, :2], -columns[:, 2:])
    assert columns.dtype == dtype


def test_noise_is_of_the_layers_size():
    parent = trained(nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 200)))
    child = widened(parent, {"0": 200}, randn(2, 200))
    for new, old in ((child[0].weight[100:], parent[0].weight), (child[2].weight[:, 100:], parent[2].weight)):
        assert (
            0.9 < float(new.detach().std() / old.detach().std()) < 1.1
        )  # of 20,000 entries, half of them drawn: within 1 %, nearly always


@pytest.mark.parametrize("fill", FILLS)
def test_moments_of_old_weights_go_on(fill):
    model = trained(Net(lambda m, x: m.two(torch.relu(m.one(x))), one=nn.Linear(3, 4), two=nn.Linear(4, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(randn(8, 3)).square().sum().backward()
    optimizer.step()
    done = fm.morph(model, [fm.Widen("one", 6, fill)], example_inputs=randn(8, 3), optimizer=optimizer)
    for old, new in ((model.one.weight, done.model.one.weight), (model.two.weight, done.model.two.weight)):
        before, after = optimizer.state[old], done.optimizer.state[new]
        assert after["exp_avg"].shape == after["exp_avg_sq"].shape == new.shape
        if fill != "duplicate":
            kept = tuple(slice(0, size) for size in old.shape)
            assert torch.equal(after["exp_avg"][kept], before["exp_avg"])
            assert torch.equal(after["exp_avg_sq"][kept], before["exp_avg_sq"])


def test_moments_of_duplicates_are_the_childs_own():
    """The first moment after one step is a tenth of the gradient; the child's gradient is known."""
    model = perceptron(nn.Tanh())
    optimizer, x = torch.optim.Adam(model.parameters(), lr=0.0), randn(8, 3)
    model(x).square().sum().backward()
    optimizer.step()
    done = fm.morph(model, [fm.Widen("0", 11, "duplicate")], example_inputs=x, optimizer=optimizer)
    done.model(x).square().sum().backward()
    for parameter in done.model.parameters():
        expected = 0.1 * parameter.grad
        torch.testing.assert_close(done.optimizer.state[parameter]["exp_avg"], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", [("0", "3"), ("3", "0")])
@pytest.mark.parametrize("fills", list(itertools.product(FILLS, FILLS)))
def test_widths_on_both_sides_of_a_layer(order, fills):
    """Layer 3 gets rows by one operator and columns by the other; so do its moments, and its shape without weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    widths = {"0": 9, "3": 13}
    plan = [fm.Widen(name, widths[name], fill) for name, fill in zip(order, fills, strict=True)]
    done = fm.morph(model, plan, example_inputs=x, optimizer=optimizer)
    old, new = model[3].weight, done.model[3].weight
    assert new.shape == (13, 9, 3, 3)
    assert [step.after for step in done.steps] == [(tuple(done.model.get_submodule(op.layer).weight.shape),) for op in plan]
    assert fm.restructure(model, plan, example_inputs=x)[3].weight.shape == new.shape
    for key in ("exp_avg", "exp_avg_sq"):
        before, after = optimizer.state[old][key], done.optimizer.state[new][key]
        assert after.shape == new.shape
        if "duplicate" not in fills:
            assert torch.equal(after[:8, :6], before)
            assert torch.equal(new[:8, :6], old)


@pytest.mark.parametrize("power", [-560, 560])
@pytest.mark.parametrize("fill", ["pair", "zero"])
def test_noise_is_of_the_size_of_weights_whose_squares_are_no_numbers(power, fill):
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    for layer in (0, 2):
        parent[layer].weight.data *= 2.0**power
    child = fm.widen(parent, {"0": 10}, fill=fill, verify=False)
    for layer in (0, 2):
        old, new = (model[layer].weight.abs().max() for model in (parent, child))
        assert old / 8 < new < 8 * old
