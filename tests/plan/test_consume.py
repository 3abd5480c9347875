"""consume=True: the child is made out of the parent, in no more memory than the child and one layer of the parent."""

from __future__ import annotations

import copy

import pytest
import torch
from fastmorph_kernels import noise
from torch import nn
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmorph as fm
from fastmorph.morphs import widen_write
from fastmorph.plan import equations

ROW = fm.Sequential([(20, 3, "relu"), (20, 1, "relu"), (None, 1)])
PLAN = fm.Plan(
    [
        *(fm.Deepen(str(index), 20, activation="relu", norm="batch") for index in range(3)),
        fm.GrowKernel("3", 5),
        fm.InsertSubnet("4", ROW),
        fm.InsertSubnet("5", fm.Residual(8)),
        fm.Deepen("2.first", 20),
    ],
    seed=5,
)


@pytest.fixture
def parent():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(6))).double().eval()


class Memory(TorchDispatchMode):
    """The most bytes that tensors held at a time, of all that took part in an operation."""

    def __init__(self, *held):
        super().__init__()
        self.alive, self.peak, self.paused = {}, 0, False
        self.see(held)

    def see(self, tensors):
        for tensor in tree_leaves(tensors):
            real = isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor)  # these hold no memory
            if real and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.paused:
            self.see((args, kwargs, result))
        return result


def size(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@pytest.fixture
def measured(monkeypatch):
    """Morph and return the peak, without what solvers hold inside, and the result."""

    def solve(*arguments, **options):
        memory.paused = True
        try:
            return decompose_many(*arguments, **options)
        finally:
            memory.paused = False

    def run(model, plan, **options):
        nonlocal memory
        with Memory(list(model.parameters())) as memory:
            grown = fm.morph(model, plan, **options)
        return memory.peak, grown

    memory, decompose_many = None, equations.decompose_many
    monkeypatch.setattr(equations, "decompose_many", solve)
    return run


@pytest.mark.parametrize("plan", [PLAN, [fm.Deepen(str(index), 20, activation="relu") for index in range(6)]])
def test_no_more_is_held_than_the_child_and_its_largest_layer(parent, measured, plan):
    beside, _ = measured(copy.deepcopy(parent), plan)
    least, grown = measured(parent, plan, consume=True)
    child = grown.model
    largest = max(parameter.nbytes for parameter in child.parameters())
    scalars = 1024
    # Each layer is compared on a map of 4 x 4: the input twice, the output of before and after, two maps of 6 x 6 between.
    maps = 8 * (4 * 16 * 4 * 4 + 2 * 20 * 6 * 6)
    assert least <= size(child) + largest + scalars + maps
    assert beside > size(child) + 5 * largest, "without consume the parent stays"


@pytest.mark.parametrize("fill", ["pair", "zero", "duplicate"])
def test_widths_hold_the_bound_too(fill, monkeypatch):
    monkeypatch.setattr(widen_write, "_BLOCK", 2**10)
    monkeypatch.setattr(noise, "BLOCK", 2**10)
    convs = [nn.Conv2d(3 if index == 0 else 48, 48, 3, padding=1) for index in range(5)]
    parent = nn.Sequential(*(part for conv in convs for part in (conv, nn.BatchNorm2d(48), nn.ReLU())), nn.Flatten())
    parent, x = parent.double().eval(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    plan, outputs = fm.Plan([fm.Widen(f"{3 * index}", 72, fill) for index in range(4)], seed=5), parent(x).detach()
    others, before, peaks, grown = copy.deepcopy(parent), size(parent), [], []
    for model, consume in ((others, False), (parent, True)):
        held = model[3].weight
        with Memory(list(model.parameters())) as memory:
            grown.append(fm.morph(model, plan, example_inputs=x, verify=False, consume=consume).model)
        peaks.append(memory.peak)
        assert (held.numel() == 0) == consume
    beside, child = grown
    assert child is parent
    assert all(torch.equal(one, two) for one, two in zip(child.parameters(), beside.parameters(), strict=True))
    torch.testing.assert_close(child(x), outputs, rtol=0, atol=1e-12)
    old = max(parameter.nbytes for parameter in child.parameters())  # one that has grown on one side, and will on the other
    block = 8 * 2**12  # a block of noise, its levels, and what little is left of one run of the model
    assert peaks[1] <= size(child) + old + block
    assert peaks[0] > size(child) + before, "without consume the parent stays"


def test_the_child_is_the_same_and_its_certificate_is_of_the_parent_that_was(parent):
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    held, outputs = parent[0].weight, parent(x).detach()
    beside = fm.morph(parent, PLAN)
    grown = fm.morph(parent, PLAN, example_inputs=x, consume=True)
    assert grown.certificate
    assert grown.model is parent
    assert held.numel() == 0, "whoever still holds an old weight finds it empty"
    assert [step.layer for step in grown.steps] == [step.layer for step in beside.steps]
    child = grown.model.state_dict()
    assert list(child) == list(beside.model.state_dict())
    for key, value in beside.model.state_dict().items():
        # The same noise and equations, but solved in batches there: rounding, as far as a condition of 1e3 carries it.
        torch.testing.assert_close(child[key], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(grown.model(x), outputs, rtol=0, atol=1e-12)


def test_a_wrong_child_is_noticed_without_the_parent(parent, monkeypatch):
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)

    def spoilt(problems, **options):
        answers = decompose_many(problems, **options)
        answers[0].second.mul_(1 + 1e-6)
        return answers

    decompose_many = equations.decompose_many
    monkeypatch.setattr(equations, "decompose_many", spoilt)
    with pytest.raises(fm.MorphError, match="FAILS"):
        fm.morph(parent, PLAN, example_inputs=x, consume=True)


def test_a_root_and_an_optimizer_are_consumed_too():
    root = nn.Linear(5, 4)
    optimizer = torch.optim.Adam(root.parameters())
    root(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    moment = optimizer.state[root.bias]["exp_avg"]
    grown = fm.morph(root, [fm.Deepen("")], example_inputs=torch.randn(3, 5), optimizer=optimizer, consume=True)
    assert grown.certificate
    assert root.weight.numel() == 0
    assert root.weight.grad is None
    assert grown.optimizer.state[grown.model.second.bias]["exp_avg"] is moment
    grown.model(torch.ones(2, 5)).sum().backward()
    grown.optimizer.step()


def test_inputs_that_do_not_run_are_refused_before_anything_is_consumed(parent):
    before = copy.deepcopy(parent.state_dict())
    with pytest.raises(fm.MorphError, match="could not be run on example_inputs"):
        fm.morph(parent, PLAN, example_inputs=torch.randn(1, 3, 6, 6), consume=True)
    assert list(parent.state_dict()) == list(before)
    assert all(value.equal(before[key]) for key, value in parent.state_dict().items())
