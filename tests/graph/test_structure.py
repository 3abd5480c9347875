"""A structure is followed once: it may be kept, is refused where it is stale, and leaves everything as it was."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from widening import Net, randn, trained

import fastmorph as fm
from fastmorph.graph import coupled
from fastmorph.graph.skeleton import Skeleton


def blocks(count=4):
    """Residual blocks of two convolutions each."""

    def forward(m, x):
        x = m.stem(x)
        for block in m.blocks:
            x = torch.relu(x + block(x))
        return m.head(x.mean((2, 3)))

    rows = [nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)) for _ in range(count)]
    return trained(Net(forward, stem=nn.Conv2d(3, 4, 1), blocks=nn.ModuleList(rows), head=nn.Linear(4, 2)))


X = randn(2, 3, 5, 5)


@pytest.fixture
def runs(monkeypatch):
    """Notes each run of a skeleton."""
    found, trace = [], Skeleton.trace

    def noted(self, *args, **options):
        found.append(self)
        return trace(self, *args, **options)

    monkeypatch.setattr(Skeleton, "trace", noted)
    return found


def test_many_calls_follow_once(runs):
    model = blocks()
    structure = fm.follow(model, X)
    tables = [coupled(model, f"blocks.{i}.0", structure=structure) for i in range(4)]
    groups = structure.groups()
    assert len(runs) == 1
    assert tables == [coupled(model, f"blocks.{i}.0", X) for i in range(4)]
    for layer in ("stem", "blocks.1.0", "blocks.3.3", "head"):
        table, group = coupled(model, layer, X), groups[f"{layer}.weight"]
        assert (group.rows, group.channels, group.step, group.fixed) == (table.rows, table.channels, table.step, table.fixed)


@pytest.mark.parametrize("given", [False, True])
def test_a_plan_is_followed_once_and_checked_once(runs, given):
    model = blocks()
    structure = fm.follow(model, X) if given else None
    plan = [fm.Widen(f"blocks.{i}.0", 8 + i, fill) for i, fill in enumerate(("pair", "zero", "duplicate", "pair"))]
    grown = fm.morph(model, plan, example_inputs=X, structure=structure, generator=torch.Generator().manual_seed(0))
    assert grown.certificate
    assert len(runs) == 2
    assert [step.layer for step in grown.steps] == [operator.layer for operator in plan]
    assert [step.after for step in grown.steps] == [((8 + i, 4, 1, 1),) for i in range(4)]
    assert [block[0].out_channels for block in grown.model.blocks] == [8, 9, 10, 11]


def test_what_meets_is_found_on_what_has_grown(runs):
    model = blocks()
    plan = [fm.Widen("blocks.0.0", 8), fm.Widen("stem", 6), fm.Widen("blocks.0.0", 11), fm.Widen("blocks.2.3", 9)]
    child = fm.morph(model, plan, example_inputs=X).model
    assert child.stem.out_channels == child.blocks[1][3].out_channels == 9
    assert child.blocks[0][0].weight.shape == (11, 9, 1, 1)
    assert len(runs) <= 5


def test_other_operators_follow_again_only_where_a_width_comes(runs):
    model = blocks()
    between = [fm.Deepen("blocks.1.0"), fm.GrowKernel("stem", 3)]
    plan = [fm.Widen("blocks.0.0", 8), *between, fm.Widen("blocks.2.0", 9)]
    assert fm.morph(model, plan, example_inputs=X).certificate
    assert len(runs) == 2  # what meets no other operator is found before them: followed, and checked together
    del runs[:]
    again = [fm.Widen("blocks.0.0", 8), *between, fm.Widen("blocks.0.0", 9)]
    assert fm.morph(model, again, example_inputs=X).certificate
    assert len(runs) == 4  # the same tensor twice is written in two turns, in the order of the plan
    del runs[:]
    meets = [fm.Widen("blocks.0.0", 8), fm.Deepen("blocks.0.0"), fm.Widen("blocks.0.0.first", 40)]
    assert fm.morph(model, meets, example_inputs=X).certificate
    assert len(runs) == 4
    del runs[:]
    fm.morph(model, plan[1:3], example_inputs=X)
    assert not runs


@pytest.mark.parametrize("place", range(5))
def test_the_one_that_is_to_be_refused_is_found_by_halves(place):
    model = blocks()
    model.blocks[1].append(
        Net(lambda m, x: m.two(m.one(x).reshape(-1, 6, 5, 5)), one=nn.Conv2d(4, 6, 1), two=nn.Conv2d(6, 4, 1))
    )
    model = trained(model)
    plan = [fm.Widen(f"blocks.{i}.0", 8) for i in (1, 2, 3)] + [fm.Widen("blocks.2.0", 12)]
    plan.insert(place, fm.Widen("blocks.1.4.one", 9))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fm.MorphError, match=r"layer 'blocks.1.4.one' cannot get more channels: 'blocks.1.4.two' fails with"):
        fm.morph(model, plan, example_inputs=X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    del plan[place]
    assert fm.morph(model, plan, example_inputs=X).certificate


def test_the_first_of_two_refusals_is_told():
    model = blocks()
    plan = [fm.Widen("blocks.0.0", 8), fm.Widen("head", 5), fm.Widen("blocks.1.0", 5), fm.Widen("nothing", 5)]
    with pytest.raises(fm.MorphError, match="layer 'head' cannot get more channels: they are the model's output"):
        fm.morph(model, plan, example_inputs=X)
    with pytest.raises(fm.MorphError, match=r"layer 'blocks.1.0' has 6 channels: channels=5"):
        fm.morph(model, plan[2:], example_inputs=X)


@pytest.mark.parametrize("with_weights", [False, True])
def test_together_is_one_by_one(with_weights):
    """The same shapes as by one call an operator; and exact."""
    model = blocks()
    plan = [fm.Widen("blocks.0.0", 8), fm.Widen("stem", 7), fm.Widen("blocks.3.0", 9), fm.Widen("blocks.1.0", 7)]
    single = model
    for operator in plan:
        single = fm.restructure(single, [operator], example_inputs=X)
    child = fm.morph(model, plan, example_inputs=X).model if with_weights else fm.restructure(model, plan, example_inputs=X)
    assert {k: v.shape for k, v in child.state_dict().items()} == {k: v.shape for k, v in single.state_dict().items()}
    assert [m.extra_repr() for m in child.modules()] == [m.extra_repr() for m in single.modules()]


def test_a_stale_structure_is_refused():
    model = blocks()
    structure = fm.follow(model, X)
    structure.check(copy.deepcopy(model))
    child = fm.widen(model, {"blocks.1.0": 9}, structure=structure)
    with pytest.raises(fm.MorphError, match=r"not this model's: module 'blocks.1.0' is another since .* fm.follow"):
        fm.widen(child, {"blocks.1.0": 12}, structure=structure)
    with pytest.raises(fm.MorphError, match=r"module 'blocks\.2' is another"):
        coupled(blocks(2), "stem", structure=structure)
    model.blocks[0][0].stride = (2, 2)
    with pytest.raises(fm.MorphError, match=r"module 'blocks.0.0' is another"):
        coupled(model, "stem", structure=structure)


def test_it_holds_no_weights():
    model = blocks()
    structure = fm.follow(model, X)
    held = [tensor for tensor in structure.skeleton.values.values() if tensor.is_floating_point()]
    assert not held
    assert all(type(tensor).__name__ == "FakeTensor" or tensor.is_meta for tensor in structure.inputs.args)


def test_threads_do_not_disturb_each_other():
    """Switches of the process are what they were, during the run too, and answers are those of one thread."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    switches = []

    class Watch(nn.Module):
        def forward(self, x):
            switches.append((torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()))
            return x

    model.layers[0].linear1 = nn.Sequential(model.layers[0].linear1, Watch())
    model.layers[0].activation = torch.relu
    expected = str(coupled(model, "layers.1.linear1", randn(2, 3, 8)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: str(coupled(model, "layers.1.linear1", randn(2, 3, 8))), range(8)))
    assert found == [expected] * 8
    assert set(switches) == {(True, True)}


def test_what_a_model_does_is_noted_at_once_where_that_is_asked_for(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2)), torch.randn(3, 4)
    noted, plain = fm.follow(model, x, taped=True), fm.follow(model, x)
    assert noted.record.tapes
    assert not plain.record.tapes
    told = [
        [[(entry.module, entry.name, entry.numbers) for entry in tape.entries] for tape in each.tapes]
        for each in (noted, plain)
    ]
    assert told[0] == told[1]
    runs: list[bool] = []
    trace = Skeleton.trace
    monkeypatch.setattr(Skeleton, "trace", lambda self, *args, **kwargs: runs.append(True) or trace(self, *args, **kwargs))
    assert fm.widen(model, {"0": 7}, fill="zero", example_inputs=x)[1].weight.shape == (7,)
    assert len(runs) == 2  # the model, and the resized one
