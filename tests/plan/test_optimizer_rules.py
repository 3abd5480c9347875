"""Optimizers beyond the five: rules state without a rule, wrappers, groups and their order."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from timm_parts import timm_part
from torch import nn
from torch.optim import lr_scheduler

import fastmorph as fm


class Mine(torch.optim.SGD):
    """An optimizer that keeps more than its parent class."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = parameter.detach().clone()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).double()


def step(model, optimizer, seed, **options):
    x = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step(**options)


def trained(model, make, steps=3):
    optimizer = make(model.parameters())
    for seed in range(steps):
        step(model, optimizer, seed + 1)
    return optimizer


MAKERS = {
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Lion": lambda p: timm_part("optim.lion", "Lion")(p, lr=0.01),
    "NAdamW": lambda p: timm_part("optim.nadamw", "NAdamW")(p, lr=0.01),
    "RMSpropTF": lambda p: timm_part("optim.rmsprop_tf", "RMSpropTF")(p, lr=0.001, momentum=0.9),
}


@pytest.mark.parametrize("name", MAKERS)
def test_training_goes_on_as_it_would_have(name):
    model = network()
    optimizer = trained(model, MAKERS[name])
    grown = fm.morph(model, [fm.GrowKernel("0", 5)], optimizer=optimizer)
    assert type(grown.optimizer) is type(optimizer)
    step(model, optimizer, 9)
    step(grown.model, grown.optimizer, 9)
    for key, parent in model.named_parameters():
        child = grown.model.get_parameter(key)
        inner = child[:, :, 1:-1, 1:-1] if key == "0.weight" else child
        torch.testing.assert_close(inner, parent, rtol=0, atol=1e-10)


def test_lamb_keeps_its_moments():
    """Its step is scaled by the norm of a whole weight, which new taps change."""
    model = network()
    optimizer = trained(model, lambda p: timm_part("optim.lamb", "Lamb")(p, lr=0.01))
    grown = fm.morph(model, [fm.GrowKernel("0", 5)], optimizer=optimizer)
    for key in ("exp_avg", "exp_avg_sq"):
        moment = grown.optimizer.state[grown.model[0].weight][key]
        assert moment[:, :, 1:-1, 1:-1].equal(optimizer.state[model[0].weight][key])
        assert moment.count_nonzero() == model[0].weight.numel()
    step(grown.model, grown.optimizer, 5)


def test_muon_goes_on_and_takes_matrices_alone():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 4, bias=False)).double()
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        model(torch.randn(5, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    grown = fm.morph(model, [fm.Deepen("1", hidden_channels=6)], optimizer=optimizer)
    kept = grown.optimizer.state[grown.model[0].weight]["momentum_buffer"]
    assert kept.equal(optimizer.state[model[0].weight]["momentum_buffer"])
    grown.model(torch.randn(5, 6, dtype=torch.float64)).square().mean().backward()
    grown.optimizer.step()
    with pytest.raises(fm.MorphError, match=r"matrices alone, and the child's '1\.activation\.weight' of shape \(1,\)"):
        fm.morph(model, [fm.Deepen("1", activation="relu")], optimizer=optimizer)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.Adafactor(p, lr=0.01), "col_var, row_var"),
        (lambda p: timm_part("optim.adafactor", "Adafactor")(p, min_dim_size_to_factor=2), "exp_avg_sq_col, exp_avg_sq_row"),
        (lambda p: Mine(p, lr=0.01, momentum=0.9), "slow"),
        (lambda p: torch.optim.Adadelta(p), "acc_delta"),
    ],
)
def test_state_without_a_rule_starts_afresh_and_says_so(make, keys):
    model = network()
    optimizer = trained(model, make)
    plan = [fm.GrowKernel("0", 5), fm.Deepen("2")]
    with pytest.warns(fm.FreshStateWarning, match=rf"starts afresh for 0\.weight: how {keys}") as caught:
        grown = fm.morph(model, plan, optimizer=optimizer)
    assert len(caught) == 1
    state = grown.optimizer.state
    assert grown.model[0].weight not in state
    for name in ("0.bias", "4.weight", "4.bias"):  # what has not changed keeps all of its state
        before, after = optimizer.state[model.get_parameter(name)], state[grown.model.get_parameter(name)]
        assert str(before) == str(after)
        assert before is not after
    step(grown.model, grown.optimizer, 5)


def test_a_rule_of_ones_own():
    class Ours(Mine):
        pass

    class Theirs(Mine):
        pass

    fm.optimizer_rule(Ours, {"momentum_buffer": "linear", "slow": "linear"})
    fm.optimizer_rule(f"{Theirs.__module__}.{Theirs.__qualname__}", {"momentum_buffer": "linear", "slow": "size"})
    for cls in (Ours, Theirs):
        model = network()
        optimizer = trained(model, lambda p, cls=cls: cls(p, lr=0.01, momentum=0.9))
        grown = fm.morph(model, [fm.GrowKernel("0", 5)], optimizer=optimizer)
        slow = grown.optimizer.state[grown.model[0].weight]["slow"][:, :, 1:-1, 1:-1]
        expected = model[0].weight if cls is Ours else model[0].weight.abs()
        torch.testing.assert_close(slow, expected.detach(), rtol=1e-14, atol=0)
        with pytest.raises(fm.MorphError, match="has a rule already"):
            fm.optimizer_rule(cls, {})


@pytest.mark.parametrize(
    ("cls", "moments", "words"),
    [
        (nn.Linear, {}, "a class of torch.optim.Optimizer"),
        (Mine, {"slow": "cubic"}, "'slow' is 'cubic'"),
        (torch.optim.Adam, {}, "has a rule already"),
        ("timm.optim.lion.Lion", {}, "has a rule already"),
    ],
)
def test_rules_that_are_none(cls, moments, words):
    with pytest.raises(fm.MorphError, match=words):
        fm.optimizer_rule(cls, moments)


# --- optimizers that wrap another --------------------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as its implementations wrap an optimizer (Foret et al. 2021)."""

    def __init__(self, params, base, **options):
        super().__init__(params, dict(rho=0.05, **options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups


class Accelerated(torch.optim.Optimizer):
    """As accelerate wraps an optimizer: all is delegated."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)


class Engine:
    """No optimizer, but it has one."""

    def __init__(self, optimizer):
        self.inner = optimizer


class InAnObject(torch.optim.SGD):
    def __init__(self, params, **options):
        params = list(params)
        super().__init__(params, **options)
        self.engine = Engine(torch.optim.SGD(params, **options))


class KeepsTheModel(torch.optim.SGD):
    def __init__(self, model, **options):
        super().__init__(model.parameters(), **options)
        self.helper = Engine(model)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda m: timm_part("optim.lookahead", "Lookahead")(torch.optim.Adam(m.parameters())), "'_base_optimizer'"),
        (lambda m: SAM(m.parameters(), torch.optim.SGD, lr=0.1), "'base_optimizer'"),
        (lambda m: Accelerated(torch.optim.SGD(m.parameters(), lr=0.1)), "'optimizer'"),
        (lambda m: InAnObject(m.parameters(), lr=0.1), "'engine'"),
        (lambda m: Engine(torch.optim.SGD(m.parameters(), lr=0.1)), "takes a torch.optim.Optimizer, not a Engine"),
        (lambda m: KeepsTheModel(m, lr=0.1), "keeps parameters in its attribute 'helper'"),
    ],
)
def test_a_wrapper_is_refused_before_any_work(wrap, words):
    model = network()
    optimizer = wrap(model)
    with pytest.raises(fm.MorphError, match=words):
        fm.morph(model, [fm.Deepen("0")], optimizer=optimizer)


@pytest.mark.parametrize("name", ["Lookahead", "OrthoGrad", "PCGrad", "ScheduleFreeWrapper", "TRAC"])
def test_wrappers_of_pytorch_optimizer_are_refused(name):
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed (requirements-zoo.txt)")
    model = network()
    optimizer = getattr(package, name)(torch.optim.Adam(model.parameters()))
    with pytest.raises(fm.MorphError, match=f"a {name} cannot be carried over: it wraps another optimizer, in its attribute"):
        fm.morph(model, [fm.Deepen("0")], optimizer=optimizer)


@pytest.mark.parametrize("name", ["SAM", "WSAM", "LookSAM"])
def test_sharpness_aware_wrappers_of_pytorch_optimizer_are_refused(name):
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed (requirements-zoo.txt)")
    model = network()
    first = (model, model.parameters()) if name == "WSAM" else (model.parameters(),)
    optimizer = getattr(package, name)(*first, base_optimizer=torch.optim.SGD, lr=0.1)
    with pytest.raises(fm.MorphError, match=f"a {name} cannot be carried over: it wraps another optimizer, in its attribute"):
        fm.morph(model, [fm.Deepen("0")], optimizer=optimizer)


def test_an_optimizer_of_accelerate_is_refused_and_what_is_inside_goes_on():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (requirements-zoo.txt)")
    model = network()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(fm.MorphError, match="AcceleratedOptimizer cannot be carried over: it wraps another optimizer"):
        fm.morph(model, [fm.GrowKernel("0", 5)], optimizer=optimizer)
    grown = fm.morph(model, [fm.GrowKernel("0", 5)], optimizer=optimizer.optimizer)
    held = {parameter for group in accelerator.prepare(grown.optimizer).param_groups for parameter in group["params"]}
    assert held == set(grown.model.parameters())


def test_what_is_inside_a_wrapper_can_be_carried_and_wrapped_anew():
    lookahead = timm_part("optim.lookahead", "Lookahead")
    model = network()
    optimizer = lookahead(torch.optim.Adam(model.parameters(), lr=0.01), k=2)
    for seed in range(5):
        step(model, optimizer, seed)
    with pytest.warns(fm.FreshStateWarning, match=r"for 0\.weight: how lookahead_slow_buff"):
        grown = fm.morph(model, [fm.GrowKernel("0", 5)], optimizer=optimizer._base_optimizer)
    wrapped = lookahead(grown.optimizer, k=2)
    before = [parameter.detach().clone() for parameter in [*model.parameters(), *grown.model.parameters()]]
    step(grown.model, wrapped, 7)
    after = [*model.parameters(), *grown.model.parameters()]
    moved = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
    assert moved == [False] * 6 + [True] * 6, "the child is trained, and the parent is not"


def test_a_scheduler_kept_on_the_optimizer_is_no_wrapper():
    model = network()
    optimizer = trained(model, lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer.plan = {"scheduler": lr_scheduler.StepLR(optimizer, 2)}
    assert fm.morph(model, [fm.Deepen("0")], optimizer=optimizer).optimizer.param_groups[0]["lr"] == 0.1


# --- groups ------------------------------------------------------------------------------------------------------------------


def one_group(model):
    return [{"params": list(model.parameters())}]


def split_by_decay(model):
    decay = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": decay}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]


def split_by_layer(model):
    """Rates that fall with depth, each layer's vectors apart."""
    groups = []
    for rate, layer in zip((1e-3, 2e-3, 3e-3), (model[0], model[2], model[4]), strict=True):
        decay = [p for p in layer.parameters() if p.ndim > 1]
        groups += [
            {"params": decay, "lr": rate},
            {"params": [p for p in layer.parameters() if p.ndim < 2], "lr": rate, "weight_decay": 0.0},
        ]
    return groups


SUBNETS = {
    "stacked": fm.Stacked([fm.Sequential([(None, 1)]), fm.Sequential([(30, 3, "relu"), (None, 1)])]),
    "stacked, whole last": fm.Stacked([fm.Sequential([(9, 1, "gelu"), (None, 1)]), fm.Sequential([(None, 3)])]),
    "residual": fm.Residual(4, norm="batch"),
}


@pytest.mark.parametrize("subnet", SUBNETS)
@pytest.mark.parametrize("groups", [one_group, split_by_decay, split_by_layer])
def test_a_saved_optimizer_is_resumed_by_one_made_afresh(groups, subnet):
    def make(network):
        return torch.optim.AdamW(groups(network), lr=1e-3, weight_decay=0.1 if groups is not one_group else 0.0)

    model = network()
    optimizer = make(model)
    for seed in range(2):
        step(model, optimizer, seed)
    plan = [
        fm.InsertSubnet("2", SUBNETS[subnet]),
        fm.Deepen("0", activation="relu", norm="batch"),
        fm.GrowKernel("0.second", 5),
    ]
    grown = fm.morph(model, plan, optimizer=optimizer)
    step(grown.model, grown.optimizer, 7)
    saved = copy.deepcopy((grown.model.state_dict(), grown.optimizer.state_dict()))

    resumed = fm.restructure(network(), grown.history)
    fresh = make(resumed)
    resumed.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    pairs = itertools.zip_longest(grown.optimizer.param_groups, fresh.param_groups)
    assert all(len(one["params"]) == len(two["params"]) for one, two in pairs)
    for (name, one), (same, two) in zip(grown.model.named_parameters(), resumed.named_parameters(), strict=True):
        assert name == same
        before, after = grown.optimizer.state[one], fresh.state[two]
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    for who, driver in ((grown.model, grown.optimizer), (resumed, fresh)):
        step(who, driver, 8)
    for one, two in zip(grown.model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_group_of_another_order_keeps_it():
    model = network()
    optimizer = torch.optim.SGD(list(model.parameters())[::-1], lr=0.1)
    grown = fm.morph(model, [fm.Deepen("2")], optimizer=optimizer)
    (group,) = grown.optimizer.param_groups
    child = grown.model
    second = [child[2].second.bias, child[2].first.weight, child[2].second.weight]
    expected = [child[4].bias, child[4].weight, *second, child[0].bias, child[0].weight]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]


def test_new_vectors_join_the_biases_where_groups_are_split():
    model = network()
    optimizer = torch.optim.AdamW(split_by_layer(model), lr=1e-3, weight_decay=0.1)
    plan = [fm.Deepen("2", activation="gelu", norm="batch"), fm.Deepen("4", activation="relu")]
    grown = fm.morph(model, plan, optimizer=optimizer)
    groups, child = grown.optimizer.param_groups, grown.model
    assert len(groups) == 6
    vectors = [child[2].norm.weight, child[2].norm.bias, child[2].activation.a, child[2].second.bias]
    assert [id(p) for p in groups[3]["params"]] == [id(p) for p in vectors]
    assert {id(p) for p in groups[5]["params"]} == {id(child[4].activation.a), id(child[4].second.bias)}
    assert [id(p) for p in groups[2]["params"]] == [id(child[2].first.weight), id(child[2].second.weight)]


def test_an_a_never_decays():
    """One group that decays: `a` stays where its gradient leaves it, norms go with the network's own."""
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, weight_decay=0.5)
    grown = fm.morph(model, [fm.Deepen("2", activation="gelu", norm="batch")], optimizer=optimizer)
    first, last = grown.optimizer.param_groups
    a = grown.model[2].activation.a
    assert last["params"] == [a]
    assert last["param_names"] == ["2.activation.a"]
    assert (last["weight_decay"], last["lr"]) == (0, 0.1)
    assert grown.model[2].norm.weight in set(first["params"])
    for parameter in grown.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    grown.optimizer.step()
    assert a.item() == 1
    again = fm.morph(grown.model, [fm.Deepen("0", activation="gelu")], optimizer=grown.optimizer)
    assert [len(group["params"]) for group in again.optimizer.param_groups] == [len(first["params"]) + 1, 2]


def test_no_decay_makes_no_group():
    model = network()
    grown = fm.morph(model, [fm.Deepen("2", activation="gelu")], optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(grown.optimizer.param_groups) == 1


# --- networks made in some other way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [True, False])
def test_state_is_transferred_by_a_mapping(by_name):
    model = network()
    optimizer = torch.optim.Adam(model.named_parameters() if by_name else model.parameters(), lr=0.02)
    step(model, optimizer, 1)
    new = nn.ModuleDict({"stem": nn.Conv2d(2, 3, 3), "head": nn.Linear(64, 7)}).double()
    olds = {"stem.weight": "0.weight", "stem.bias": "0.bias", "head.weight": "4.weight", "head.bias": "4.bias"}
    mapping = olds if by_name else {name: model.get_parameter(old) for name, old in olds.items()}
    with pytest.warns(fm.FreshStateWarning, match=r"for head\.weight, head\.bias: the shapes"):
        carried = fm.transfer_optimizer(optimizer, new, mapping)
    (group,) = carried.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in new.parameters()]
    assert group["lr"] == 0.02
    assert set(carried.state) == {new["stem"].weight, new["stem"].bias}
    before, after = optimizer.state[model[0].weight], carried.state[new["stem"].weight]
    assert after["exp_avg"].equal(before["exp_avg"])
    assert after["exp_avg"] is not before["exp_avg"]
    with pytest.raises(fm.MorphError, match=r"it differs in head\.bias"):
        fm.transfer_optimizer(optimizer, new, {key: mapping[key] for key in list(mapping)[:3]})
    with pytest.raises(fm.MorphError, match=r"no parameter of the name 9\.weight"):
        fm.transfer_optimizer(optimizer, new, {**mapping, "head.bias": "9.weight"})
