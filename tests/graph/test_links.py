"""Growth of plain layers one behind the other takes no run; wherever anything else could read a size, the model is run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as globally
from torch.nn.utils import parametrizations
from widening import Net

import fastmorph as fm
from fastmorph.graph import links, propose
from fastmorph.graph.propose import Found, Proposals
from fastmorph.graph.skeleton import Skeleton

BATCHES = {nn.Linear: (6, 5), nn.Conv1d: (3, 5, 12), nn.Conv2d: (3, 5, 12, 12), nn.Conv3d: (2, 5, 12, 12, 12)}


def layer(kind, inputs, outputs, taps=1):
    return kind(inputs, outputs, *([taps] if kind is not nn.Linear else []))


def between(kind):
    if "Norm" in kind.__name__:
        return kind(7)
    return kind(2) if "Pool" in kind.__name__ else kind()


def stack(kind, *inside):
    torch.manual_seed(0)
    model = nn.Sequential(layer(kind, 5, 7, 3), *inside, layer(kind, 7, 4)).double().eval()
    for norm in (part for part in model if hasattr(part, "running_var")):
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.normal_()
    return model, torch.randn(BATCHES[kind], dtype=torch.float64)


def first(model, inputs, width=12):
    structure = fm.follow(model, inputs)
    return structure, Proposals(structure, "0").first(width)


EVERY = [(kind, part) for kind, parts in links._LAYERS.items() for part in sorted(parts, key=lambda part: part.__name__)]


@pytest.mark.parametrize(("kind", "part"), EVERY, ids=lambda kind: kind.__name__)
def test_what_is_known_without_a_run_is_what_a_run_finds(kind, part):
    model, inputs = stack(kind, between(part))
    structure, growth = first(model, inputs)
    assert structure.is_sure(growth)
    child = structure.grown(growth)
    assert growth.difference(child.record, child.coupling(growth.coupling.wider)) is None
    grown = fm.widen(model, {"0": 12}, example_inputs=inputs, structure=structure, verify=False, generator=0)
    torch.testing.assert_close(grown(inputs), model(inputs), rtol=1e-12, atol=1e-12)


def test_no_run_is_made(monkeypatch):
    model, inputs = stack(
        nn.Conv2d, nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 7, 1), nn.Tanh(), nn.Sequential(nn.MaxPool2d(2))
    )
    structure = fm.follow(model, inputs)
    traced = Skeleton.trace
    monkeypatch.setattr(Skeleton, "trace", lambda *_, **__: pytest.fail("the model was run"))
    options = {"example_inputs": inputs, "structure": structure, "generator": 0}
    both = fm.widen(model, {"0": 11, "3": 9}, **options)
    torch.testing.assert_close(both(inputs), model(inputs), rtol=1e-12, atol=1e-12)
    assert (both[1].num_features, both[3].in_channels, both[3].out_channels, both[6].in_channels) == (11, 11, 9, 9)
    monkeypatch.setattr(Skeleton, "trace", traced)
    again = fm.morph(model, [fm.Widen("0", 11), fm.Widen("0", 13), fm.Widen("3", 8)], **options).model
    torch.testing.assert_close(again(inputs), model(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fill", ["pair", "zero", "duplicate"])
def test_the_child_is_that_of_a_run(monkeypatch, fill):
    model, inputs = stack(nn.Linear, nn.GELU(), nn.Linear(7, 7), nn.ReLU())
    plan, options = [fm.Widen("0", 12, fill), fm.Widen("2", 10, fill)], {"example_inputs": inputs, "generator": 3}
    known = fm.morph(model, plan, **options).model.state_dict()
    monkeypatch.setattr(propose.Structure, "is_sure", lambda *_: False)
    found = fm.morph(model, plan, **options).model.state_dict()
    assert known.keys() == found.keys()
    assert all(torch.equal(known[name], found[name]) for name in known)


def twice(model):
    model.insert(2, model[1])


def tied(model):
    model[0].weight = model[2].weight = nn.Parameter(torch.randn(7, 7, dtype=torch.float64))


def hooked(model):
    model[2].register_forward_pre_hook(lambda module, given: None)


def own_forward(model):
    model[1].forward = torch.relu


def computed(model):
    parametrizations.weight_norm(model[2])


def user_code(model):
    model[1] = Net(lambda m, x: x.relu())


def nested(model):
    model[1] = Net(lambda m, x: m.act(x), act=nn.ReLU())


def kept_tensor(model):
    model[0].seen = torch.zeros(7)


STRANGE = [twice, tied, hooked, own_forward, computed, user_code, nested, kept_tensor]


@pytest.mark.parametrize("change", STRANGE, ids=lambda change: change.__name__)
def test_what_is_not_plain_is_run(change):
    model, inputs = stack(nn.Linear, nn.ReLU())
    model[0], inputs = nn.Linear(7, 7).double(), torch.randn(6, 7, dtype=torch.float64)
    model[2] = nn.Linear(7, 7).double()
    assert fm.follow(model, inputs).links
    change(model)
    assert not fm.follow(model, inputs).links


def test_a_hook_on_every_module_is_run():
    model, inputs = stack(nn.Linear, nn.ReLU())
    hook = globally.register_module_forward_hook(lambda module, given, out: None)
    try:
        assert not fm.follow(model, inputs).links
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)), torch.randn(6, 7, 5)),  # the norm of another 7
        (nn.Sequential(nn.Conv2d(5, 7, 3), nn.Conv2d(7, 14, 3, groups=7)), torch.randn(2, 5, 9, 9)),
        (nn.Sequential(nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(343, 4)), torch.randn(2, 5, 9, 9)),
        (nn.Sequential(nn.Conv2d(5, 7, 3), nn.Linear(7, 4)), torch.randn(2, 5, 9, 9)),  # reads the map's own width
        (nn.Sequential(nn.Linear(5, 7), nn.Softmax(-1), nn.Linear(7, 4)), torch.randn(6, 5)),
    ],
    ids=["norm", "groups", "flatten", "map", "softmax"],
)
def test_what_is_no_whole_link_is_run(model, inputs):
    structure, growth = first(model.double().eval(), inputs.double())
    assert growth is None or not structure.is_sure(growth)


def test_code_that_reads_a_size_is_refused_as_before():
    inner, inputs = stack(nn.Linear, nn.ReLU())

    def forward(m, x):
        return m.inner(x) if m.inner[0].out_features == 7 else -m.inner(x)

    model = Net(forward, inner=inner)
    structure = fm.follow(model, inputs)
    found = Proposals(structure, "inner.0").find(12)
    assert not isinstance(found, Found)
    with pytest.raises(fm.MorphError, match="would run"):
        fm.widen(model, {"inner.0": 12}, example_inputs=inputs)


def test_a_growth_of_half_a_link_is_none():
    model, inputs = stack(nn.Linear, nn.ReLU())
    structure, growth = first(model, inputs)
    half = copy.copy(growth)
    object.__setattr__(half, "given", dict(list(growth.layouts.items())[:2]))
    vars(half).pop("layouts", None)
    assert not structure.is_sure(half)
