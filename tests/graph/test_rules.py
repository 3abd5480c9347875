"""The door for operators that the library does not know: a rule from outside, and what is refused without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from widening import FILLS, Net, randn, trained, widened

import fastmorph as fm
from fastmorph.graph import Call, Flow, Tracer, rules


@torch.library.custom_op("fastmorph_tests::double_plus_one", mutates_args=())
def double_plus_one(x: torch.Tensor) -> torch.Tensor:
    return 2 * x + 1


@double_plus_one.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("fastmorph_tests::project", mutates_args=())
def project(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * (x @ weight.t())


@project.register_fake
def _(x, weight, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@pytest.fixture(autouse=True)
def no_rules_stay() -> Iterator[None]:
    known = dict(rules._RULES)
    yield
    rules._RULES.clear()
    rules._RULES.update(known)
    rules.rule_of.cache_clear()


def elementwise(tracer: Tracer, call: Call) -> Flow:
    flow = tracer.flow(call["x"])
    tracer.note(call.name)
    tracer.record.mark("makes_of_zero", flow.slots)
    return flow


def product(tracer: Tracer, call: Call) -> Flow:
    """(*, k), (n, k) -> (*, n), by the rule of the library's own."""
    tracer.note(call.name, call["scale"])
    weight = tracer.flow(call["weight"])
    turned = Flow(tuple(slot.t() for slot in weight.slots), weight.opaque, weight.linear)
    return rules.contract.contracted(tracer, tracer.flow(call["x"]), turned, call["x"].shape[-1])


def perceptron():
    return trained(nn.Sequential(nn.Linear(3, 6), Net(lambda m, x: double_plus_one(x)), nn.Linear(6, 2)))


def test_without_a_rule_it_is_refused():
    with pytest.raises(fm.MorphError, match="'1' runs fastmorph_tests::double_plus_one, of which it is not known how"):
        fm.widen(perceptron(), {"0": 9}, example_inputs=randn(4, 3))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("operator", [torch.ops.fastmorph_tests.double_plus_one, "fastmorph_tests::double_plus_one"])
def test_a_rule_from_outside(operator, fill):
    assert fm.graph.rule(operator)(elementwise) is elementwise
    child = widened(perceptron(), {"0": 9}, randn(4, 3), fill=fill)
    assert child[2].in_features == 9


@pytest.mark.parametrize("fill", FILLS)
def test_a_rule_that_uses_the_librarys_own(fill):
    fm.graph.rule(torch.ops.fastmorph_tests.project.default)(product)
    values = {"one": nn.Parameter(torch.ones(5, 3)), "two": nn.Parameter(torch.ones(2, 5))}
    model = trained(Net(lambda m, x: project(torch.tanh(project(x, m.one, 0.5)), m.two, 2.0), **values))
    child = widened(model, {"one": 8}, randn(4, 3), fill=fill)
    assert child.two.shape == (2, 8)


def test_a_clash_raises():
    with pytest.raises(fm.MorphError, match="operator aten::convolution has a rule; give replace=True"):
        fm.graph.rule(torch.ops.aten.convolution)(elementwise)
    assert rules.rule_of(torch.ops.aten.convolution.default) is not elementwise


def test_a_rule_may_be_replaced():
    def blocking(tracer: Tracer, call: Call) -> None:
        tracer.block(tracer.flow(call["input"]).slots, "is not to be followed")

    fm.graph.rule("aten::convolution", replace=True)(blocking)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
    with pytest.raises(fm.MorphError, match="it is a Conv2d and makes no channels"):
        fm.widen(model, {"0": 6}, example_inputs=randn(1, 3, 4, 4))


def test_what_is_no_operator_is_refused():
    for thing in (torch.relu, "relu", 3):
        with pytest.raises(fm.MorphError, match=r"is no operator: give one of torch\.ops"):
            fm.graph.rule(thing)(elementwise)
