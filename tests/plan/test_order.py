"""Widths between operators that change layers: found together, and the child that the written order gives, bit by bit."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn
from widening import Net, randn, trained

import fastmorph as fm
from fastmorph.plan import transaction as transactions
from fastmorph.plan.order import EVERYTHING, Reach, interleaved, turns

BLOCKS = 4


def forward(model, x):
    for number in range(BLOCKS):
        one, two = (model.get_submodule(f"{part}{number}") for part in ("one", "two"))
        x = x + two(torch.relu(one(x)))
    return model.head(x.mean((2, 3)))


def network():
    layers = {
        f"{part}{number}": nn.Conv2d(*sizes, 3, padding=1)
        for number in range(BLOCKS)
        for part, sizes in (("one", (4, 6)), ("two", (6, 4)))
    }
    return trained(Net(forward, **layers, head=nn.Linear(4, 3)))


def widen(number, channels=8):
    return fm.Widen(f"one{number}", channels)


def deepen(number):
    return fm.Deepen(f"two{number}", activation="relu")


MIXED = [op for number in range(BLOCKS) for op in (widen(number), deepen(number), fm.GrowKernel(f"one{number}", 5))]
MEETING = [
    *(deepen(0), widen(0), fm.GrowKernel("one0", 5), widen(1), fm.Widen("one1", 9), deepen(1)),
    *(deepen(2), fm.Widen("two2.first", 40), widen(2), fm.InsertSubnet("two3", fm.Residual(4)), widen(3)),
]
PATTERNS = [
    *(fm.Widen("one[01]", "x1.5"), fm.Deepen("two[01]", "x2", activation="relu"), fm.GrowKernel("one*", 5)),
    *(fm.Widen("one?", "x2"), fm.Deepen("two[23]", activation="relu"), fm.Widen("one3", "x1.2")),
]
# Names and numbers that depend on operators in front of them.
DEPENDING = [
    *(widen(0), deepen(0), fm.Widen("one0", "x1.5"), fm.Deepen("two1", 12), fm.Widen("two1.f*", 16)),
    *(
        deepen(2),
        fm.Widen("**.first", "x1.1"),
        fm.Deepen("two3", "x3"),
        fm.Widen("one[0-2]", "x1.5"),
        fm.GrowKernel("*.second", 3),
    ),
    *(fm.Widen("one1", "x1.5"), fm.Widen("one1", "x1.5"), fm.GrowKernel("one1", 5), fm.Widen("one*", "x1.1")),
]


@pytest.fixture
def follows(monkeypatch):
    """How often a network is followed from nothing, and how often in all."""
    counts = {"follow": 0, "grown": 0}
    plain, grown = transactions.follow, fm.graph.Structure.grown

    def counted(*given, **options):
        counts["follow"] += 1
        return plain(*given, **options)

    def counted_growth(structure, growth):
        counts["grown"] += 1
        return grown(structure, growth)

    monkeypatch.setattr(transactions, "follow", counted)
    monkeypatch.setattr(fm.graph.Structure, "grown", counted_growth)
    return counts


@pytest.mark.parametrize("plan", [MIXED, MEETING, PATTERNS, DEPENDING], ids=["mixed", "meeting", "patterns", "depending"])
def test_the_child_is_that_of_the_written_order(plan, monkeypatch):
    model, x = network(), randn(2, 4, 7, 6)
    found = fm.morph(model, plan, example_inputs=x, generator=3)
    monkeypatch.setattr(transactions, "interleaved", lambda wide: False)
    expected = fm.morph(model, plan, example_inputs=x, generator=3)
    assert {key: value.shape for key, value in found.model.state_dict().items()} == {
        key: value.shape for key, value in expected.model.state_dict().items()
    }
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    assert found.history == expected.history
    assert [step.layer for step in found.steps] == [operator.target for operator in found.history]
    assert [(s.layer, s.before, s.after) for s in found.steps] == [(s.layer, s.before, s.after) for s in expected.steps]
    torch.testing.assert_close(found.model(x), model(x), rtol=0, atol=1e-10)
    again = fm.morph(model, found.history).model
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), found.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "plan",
    [
        [fm.Widen("0", 8), fm.Deepen("6", "x2", activation="relu"), fm.Widen("2", 9), fm.Widen("4", 9)],
        [
            fm.Deepen("4", activation="relu"),
            fm.Widen("0", 8),
            fm.Widen("2", 9),
            fm.GrowKernel("6", 5),
            fm.Widen("[02]", "x1.5"),
        ],
    ],
    ids=["apart", "neighbours"],
)
def test_widths_of_one_tensor_are_written_as_they_stand(plan, monkeypatch):
    convs = [nn.Conv2d(3 if number == 0 else 6, 6, 3, padding=1) for number in range(5)]
    model, x = trained(nn.Sequential(*(part for conv in convs for part in (conv, nn.ReLU())))), randn(1, 3, 8, 8)
    found = fm.morph(model, plan, example_inputs=x, generator=3)
    monkeypatch.setattr(transactions, "interleaved", lambda wide: False)
    expected = fm.morph(model, plan, example_inputs=x, generator=3)
    assert found.history == expected.history
    for (name, value), other in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_mixed_plan_is_followed_once(follows):
    model, x = network(), randn(2, 4, 7, 6)
    fm.morph(model, MIXED, example_inputs=x, generator=3)
    assert follows == {"follow": 1, "grown": 1}
    fm.morph(model, MIXED, structure=fm.follow(model, x), example_inputs=x, generator=3)
    assert follows["grown"] == 2
    follows.update(follow=0, grown=0)
    locals_first = [op for number in range(BLOCKS) for op in (deepen(number), widen(number))]
    fm.morph(model, locals_first, example_inputs=x, generator=3)
    assert follows == {"follow": 2, "grown": 1}, "once to see what meets, once for the deepened network"


def test_patterns_and_factors_are_followed_once_too(follows):
    model, x = network(), randn(2, 4, 7, 6)
    plan = [fm.Widen("one[01]", "x1.5"), fm.Deepen("two[01]", "x2"), fm.Widen("one[23]", "x2")]
    fm.morph(model, plan, example_inputs=x, generator=3)
    assert follows == {"follow": 1, "grown": 1}


def test_what_is_refused_is_refused_at_its_place():
    model, x = network(), randn(2, 4, 7, 6)
    for plan, cause in (
        ([*MIXED[:3], fm.Widen("two9", 8)], "no layer 'two9'"),
        ([widen(0), deepen(0), widen(1, 5)], "must be an int of at least that"),
        ([widen(0), fm.Deepen("two9"), widen(1, 5)], "no layer 'two9'"),
        ([widen(0), deepen(0), fm.Widen("head", 5)], "'head' cannot get more channels: they are the model's output"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(fm.MorphError, match=cause):
            fm.morph(model, plan, example_inputs=x)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_turns_keep_the_order_of_what_meets():
    generator = torch.Generator().manual_seed(0)
    names = ["a", "a.b", "a.c", "d", "d.e", "f", "g.h", ""]
    for _ in range(200):
        count = int(torch.randint(1, 9, (), generator=generator))
        draws = torch.randint(0, len(names) - (count % 2), (count, 2), generator=generator)
        reaches = [frozenset(names[int(draw)] for draw in pair) for pair in draws]
        wide = (torch.rand(count, generator=generator) < 0.5).tolist()
        found = turns(reaches, wide)
        order = [place for turn in found for place in turn]
        assert sorted(order) == list(range(count))
        assert all(len({wide[place] for place in turn}) == 1 for turn in found)
        for one, two in combinations(range(count), 2):
            if meet(reaches[one], reaches[two]):
                assert order.index(one) < order.index(two)
                assert not (wide[one] and wide[two]) or not any({one, two} <= set(turn) for turn in found)


def meet(one, two):
    inside = [(a, b) for a in one for b in two]
    return any(a == b or "" in (a, b) or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a, b in inside)


def test_reach():
    reach = Reach(frozenset({"a.b", "c"}))
    assert reach.covers("a.b.d")
    assert not reach.covers("a")
    assert reach.meets(frozenset({"a"}))
    assert reach.meets(EVERYTHING)
    assert not reach.meets(frozenset({"a.bc", "d"}))
    assert not Reach().meets(EVERYTHING)
    assert interleaved([True, False, True])
    assert not interleaved([False, True, True, False])
