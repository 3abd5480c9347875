"""`morph`: a plan is one transaction, replayed to the bit by its history, and nothing is half done where it fails."""

from __future__ import annotations

import copy
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmorph as fm
from fastmorph.plan import equations

PLAN = fm.Plan(
    [
        fm.Deepen("0", hidden_channels=12, kernel_sizes=((5, 5), 3), activation="relu"),
        fm.Deepen("0.first", activation="gelu", norm="batch"),
        fm.Deepen("4", 8),
    ]
)
BRANCHES = fm.Stacked([fm.Sequential([(12, 3, "relu"), (10, 1, "gelu"), (None, 1)]), fm.Sequential([(None, 1)]), fm.Skip()])


class Network(nn.Module):
    """Strides, dilation, groups, reflection, a layer used twice, tied weights, hooks, a frozen layer and mixed modes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 8, (3, 2), groups=2)
        self.head, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.out = nn.Linear(8, 3)
        self.norm.requires_grad_(False)
        self.eval()
        self.out.train()

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.out(self.tied(torch.relu(self.head(self.grouped(x).mean((2, 3))))))


MIXED = fm.Plan(
    [
        fm.GrowKernel("stem", (7, 6)),
        fm.Deepen("stem.conv", 9, activation="relu", norm="batch"),
        fm.InsertSubnet("twice", BRANCHES),
        fm.Deepen("grouped", 10, activation="gelu"),
        fm.InsertSubnet("grouped.second", fm.Residual(4)),
        fm.GrowKernel("twice.1.layer0", 3),
        fm.Widen("tied", 10),
        fm.InsertSubnet("out", fm.Sequential([(9, None, "tanh"), (None, None)])),
    ]
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    return net.eval()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().double()


@pytest.fixture
def calls(monkeypatch):
    """The number of problems of each call of decompose_many."""
    numbers, decompose_many = [], equations.decompose_many

    def counted(problems, **options):
        numbers.append(len(problems))
        return decompose_many(problems, **options)

    monkeypatch.setattr(equations, "decompose_many", counted)
    return numbers


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return list(one) == list(two) and all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_plan_is_run_and_certified(model):
    before = copy.deepcopy(model)
    x = torch.randn(4, 3, 12, 12)
    done = fm.morph(model, PLAN, example_inputs=x, calibrate=[x], generator=torch.Generator().manual_seed(0))
    assert done.certificate
    assert done.optimizer is None
    assert [step.layer for step in done.steps] == ["0", "0.first", "4"]
    assert (done.steps[0].before, done.steps[0].after) == ((8, 3, 5, 5), ((12, 3, 5, 5), (8, 12, 3, 3)))
    assert same(model, before)
    again = fm.morph(model, done.history, calibrate=[x], verify=False)
    assert again.certificate is None
    assert same(again.model, done.model)
    assert not same(fm.morph(model, PLAN).model, fm.morph(model, PLAN).model)


def test_operators_of_every_kind_in_one_plan(network):
    before = copy.deepcopy(network)
    modes = {name: module.training for name, module in network.named_modules()}
    x = torch.randn(4, 3, 16, 15, dtype=torch.float64)
    grown = fm.morph(network, MIXED, example_inputs=x)
    assert grown.certificate
    assert grown.certificate.max_rel < 1e-10
    assert same(network, before)
    child = grown.model
    assert {name: module.training for name, module in child.named_modules() if name in modes} == modes
    assert child.tied.weight is child.head.weight
    assert not child.norm.weight.requires_grad
    assert all(parameter.device.type == "cpu" for parameter in child.parameters())
    assert {parameter.dtype for parameter in child.parameters()} == {torch.float64}


def test_all_layers_are_solved_in_one_call(network, calls):
    fm.morph(network, [fm.Deepen(name) for name in ("stem", "twice", "grouped", "out")])
    assert calls == [4]


def test_layers_are_settled_when_the_next_operator_reads_them(network, calls):
    fm.morph(network, [fm.Deepen("stem"), fm.Deepen("out"), fm.Deepen("stem.second"), fm.Deepen("grouped")])
    assert calls == [2, 2]


def test_rows_take_a_round_for_each_kernel(network, calls):
    row = fm.Sequential([(20, 3, None), (16, 1, None), (None, 1)])
    fm.morph(network, [fm.InsertSubnet("stem", fm.Sequential([(8, 5, None), (None, 1)])), fm.InsertSubnet("twice", row)])
    assert calls == [2, 1]


# --- histories ---------------------------------------------------------------------------------------------------------------


def test_a_history_replays_bit_for_bit(network, tmp_path):
    x = torch.randn(2, 3, 16, 15, dtype=torch.float64)
    grown = fm.morph(network, MIXED, example_inputs=x)
    grown.history.save(tmp_path / "plan.toml")
    again = fm.morph(network, fm.Plan.load(tmp_path / "plan.toml"))
    assert same(again.model, grown.model)
    assert again.history == grown.history
    assert grown.history.inputs == (((2, 3, 16, 15), "float64"),)
    other = fm.morph(network, grown.history, generator=torch.Generator().manual_seed(1))
    assert not same(other.model, grown.model), "a generator that is given decides"


def test_global_noise_is_left_alone(network):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    x = torch.zeros(2, 3, 16, 15, dtype=torch.float64)
    fm.morph(network, MIXED, generator=torch.Generator().manual_seed(0), example_inputs=x)
    fm.restructure(network, MIXED)
    assert torch.equal(torch.get_rng_state(), states[2])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


# --- failures ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last",
    [
        fm.Deepen("nowhere"),
        fm.Deepen("out", 1),
        fm.GrowKernel("stem", 1),
        fm.InsertSubnet("grouped", fm.Sequential([(6, 2), (None, 1)])),
        fm.InsertSubnet("out", fm.Sequential([(8, 1, "nonsense"), (None, 1)])),
    ],
)
def test_nothing_is_half_done_where_a_plan_fails(network, last):
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(2, 3, 16, 15).double()).sum().backward()
    optimizer.step()
    before, state = copy.deepcopy(network), copy.deepcopy(optimizer.state_dict())
    names, noise = [name for name, _ in network.named_modules()], torch.get_rng_state()
    with pytest.raises(fm.MorphError):
        fm.morph(network, [*MIXED, last], optimizer=optimizer, generator=torch.Generator().manual_seed(0))
    assert same(network, before)
    assert [name for name, _ in network.named_modules()] == names
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(torch.get_rng_state(), noise)
    assert torch.get_default_dtype() == torch.float32


def test_an_equation_that_fails_names_its_layer_among_others(network):
    plan = [fm.Deepen("stem"), fm.Deepen("out"), fm.Deepen("grouped", 6, kernel_sizes=(2, 2))]
    with pytest.raises(fm.MorphError, match=r"^layer 'grouped' \(each of its 2 groups\): hidden_channels=3"):
        fm.morph(network, plan)


def test_an_inexact_child_is_not_handed_over(model):
    plan = [fm.Deepen("0", hidden_channels=6, kernel_sizes=(3, 3))]
    with pytest.raises(fm.MorphError, match="layer '0'"):
        fm.morph(model, plan)
    x = torch.randn(2, 3, 12, 12)
    done = fm.morph(model, plan, example_inputs=x, allow_inexact=True, solver=fm.General(max_iter=3))
    assert not done.certificate


# --- children rebuilt --------------------------------------------------------------------------------------------------------


def test_a_child_is_rebuilt_from_its_plan_and_its_own_weights(network):
    child = fm.morph(network, MIXED).model
    torch.manual_seed(7)
    stranger = Network().double()
    rebuilt = fm.restructure(stranger, MIXED)
    rebuilt.load_state_dict(child.state_dict())
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(rebuilt(x), child(x), rtol=0, atol=0)
    assert rebuilt.tied.weight is rebuilt.head.weight
    assert isinstance(stranger.stem, nn.Conv2d)


def test_a_child_is_rebuilt_on_the_meta_device(network):
    child = fm.morph(network, MIXED, example_inputs=torch.randn(2, 3, 16, 15, dtype=torch.float64))
    with torch.device("meta"):
        skeleton = Network().double()
    rebuilt = fm.restructure(skeleton, child.history)
    assert all(tensor.device.type == "meta" for tensor in rebuilt.state_dict().values())
    rebuilt.load_state_dict(child.model.state_dict(), assign=True)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(rebuilt(x), child.model(x), rtol=0, atol=0)


# --- statistics and progress -------------------------------------------------------------------------------------------------


def test_norms_of_every_operator_are_calibrated(network):
    x = torch.randn(16, 3, 16, 16, dtype=torch.float64)
    plan = [
        fm.Deepen("stem", norm="batch"),
        fm.InsertSubnet("grouped", fm.Sequential([(12, (3, 2), "relu", "batch"), (None, 1)])),
        fm.InsertSubnet("out", fm.Residual(4, norm="batch")),
    ]
    child = fm.morph(network, plan, example_inputs=x, calibrate=[x]).model
    for norm in (child.stem.norm, child.grouped.norm0, child.out.residual[1].norm):
        assert norm.running_mean.count_nonzero() == norm.num_features
        torch.testing.assert_close(norm.bias, norm.running_mean)
    with pytest.raises(fm.MorphError, match="no inserted layer has a norm"):
        fm.morph(network, [fm.GrowKernel("stem", 7)], calibrate=[x])


def test_progress_is_shown_only_when_asked_for(model, capsys):
    fm.morph(model, PLAN)
    assert capsys.readouterr().err == ""
    fm.morph(model, PLAN, progress=True)
    shown = capsys.readouterr().err
    assert "morphing" in shown
    assert "solving" in shown


def test_restructure_copies_no_weights():
    class Copies(TorchDispatchMode):
        sizes: ClassVar[list[int]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_):
                self.sizes.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)), torch.randn(2, 3, 8, 8)
    with Copies() as copies:
        child = fm.restructure(model, [fm.Widen("0", 20), fm.Deepen("2")], example_inputs=x)
    assert all(size <= 64 for size in copies.sizes)  # buffers of 16 numbers, which are copied byte by byte
    assert {name: value.shape for name, value in child.state_dict().items()} == {
        name: value.shape for name, value in fm.morph(model, [fm.Widen("0", 20), fm.Deepen("2")]).model.state_dict().items()
    }
