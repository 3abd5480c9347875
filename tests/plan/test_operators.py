"""Morphs from outside the library work wherever its own do; what is no morph, or asks for the impossible, is refused."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from outside.morphs import Between, Factor, Reorder
from torch import nn

import fastmorph as fm
from fastmorph.equation import problem
from fastmorph.plan import equations, operators
from fastmorph.plan.operators import OPERATORS, PARTS

PLAN = fm.Plan([Reorder("0", "2"), Factor("2", Between(12), 0.5), fm.Deepen("0", 9, activation="relu")])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return list(one) == list(two) and all(torch.equal(value, two[key]) for key, value in one.items())


# --- operators from outside --------------------------------------------------------------------------------------------------


def test_operators_from_outside_are_run_and_certified(model):
    before, x = copy.deepcopy(model), torch.randn(4, 5, dtype=torch.float64)
    grown = fm.morph(model, PLAN, example_inputs=x, generator=torch.Generator().manual_seed(0))
    assert grown.certificate
    assert same(model, before)
    assert [step.layer for step in grown.steps] == ["0", "2", "0"]
    assert grown.steps[1].after == ((12, 8), (3, 12))
    assert grown.model[2][0].weight.shape == (12, 8)


def test_operators_from_outside_go_through_files_and_are_replayed(model, tmp_path):
    grown = fm.morph(model, PLAN)
    grown.history.save(tmp_path / "plan.toml")
    history = fm.Plan.load(tmp_path / "plan.toml")
    assert history == grown.history
    assert same(fm.morph(model, history).model, grown.model)
    assert not same(fm.morph(model, PLAN).model, grown.model), "another seed"
    assert PLAN.to_toml().splitlines()[5:12] == [
        "[[morph]]",
        'operator = "outside.factor"',
        'where = "2"',
        "gain = 0.5",
        "[morph.between]",
        'kind = "outside.between"',
        "channels = 12",
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_children_of_operators_from_outside_are_rebuilt(model, device):
    child = fm.morph(model, PLAN).model
    with torch.device(device):
        rebuilt = fm.restructure(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double(), PLAN)
    assert {parameter.device.type for parameter in rebuilt.parameters()} == {device}
    rebuilt.load_state_dict(child.state_dict(), assign=True)
    assert same(rebuilt, child)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(rebuilt(x), child(x), rtol=0, atol=0)


def test_optimizer_state_follows_operators_from_outside(model):
    """A shuffle commutes with Adam: parent and child are the same network after any number of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def train(network, optimizer):
        optimizer.zero_grad()
        network(torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)).square().sum().backward()
        optimizer.step()

    train(model, optimizer)
    grown = fm.morph(model, Reorder("0", "2"), optimizer=optimizer)
    assert not torch.equal(grown.model[0].weight, model[0].weight)
    for _ in range(3):
        train(model, optimizer)
        train(grown.model, grown.optimizer)
    for layer in (model[0], grown.model[0]):
        layer.order = layer.bias.argsort()
    torch.testing.assert_close(grown.model[0].weight[grown.model[0].order], model[0].weight[model[0].order], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        grown.model[2].weight[:, grown.model[0].order], model[2].weight[:, model[0].order], rtol=0, atol=1e-12
    )


def test_the_example_of_the_page_is_a_morph(model):
    lines = inspect.cleandoc(operators.__doc__).splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    ") or not line)
    scope = {"fm": fm, "torch": torch, "dataclass": dataclass, "partial": partial, "__name__": __name__}
    exec(code, scope)
    model[1] = nn.ReLU()
    optimizer, x = torch.optim.RMSprop(model.parameters(), momentum=0.5), torch.randn(4, 5, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    grown = fm.morph(model, scope["Rescale"]("0", "2", 4.0), example_inputs=x, optimizer=optimizer)
    assert grown.certificate
    weights, states = ([m[0].bias, m[2].weight] for m in (model, grown.model)), (optimizer.state, grown.optimizer.state)
    (bias, columns), (new_bias, new_columns) = ([state[w] for w in each] for state, each in zip(states, weights, strict=True))
    # A gradient is divided by what its weight is multiplied with, and powers of two do not round.
    assert torch.equal(new_bias["momentum_buffer"] * 4, bias["momentum_buffer"])
    assert torch.equal(new_bias["square_avg"] * 16, bias["square_avg"])
    assert torch.equal(new_columns["square_avg"], columns["square_avg"] * 16)


# --- the registry ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stranger:
    target: str
    part: object = None

    def apply(self, transaction):
        raise AssertionError("never run")


@dataclass(frozen=True)
class Named(Stranger):
    operator: str = ""


@dataclass
class Thawed:
    target: str
    apply: object


@dataclass(frozen=True)
class Part:
    size: int = 1


def test_the_library_registers_its_own_by_the_same_door():
    own = {"deepen": fm.Deepen, "widen": fm.Widen, "grow_kernel": fm.GrowKernel, "insert_subnet": fm.InsertSubnet}
    assert own.items() <= OPERATORS.classes.items()
    assert PARTS.classes["layer"] is fm.LayerSpec
    fm.register_operator(fm.Deepen, name="deepen")  # again: a module that is imported twice does


@pytest.mark.parametrize(
    ("register", "words"),
    [
        (lambda: fm.register_operator(Stranger, name="deepen"), "deepen.Deepen is called 'deepen'"),
        (lambda: fm.register_operator(fm.Deepen, name="deeper"), "Deepen is called 'deepen'"),
        (lambda: fm.register_operator(Stranger, name=""), "name=''"),
        (lambda: fm.register_operator(Part, name="part"), "lacks target or apply"),
        (lambda: fm.register_operator(Named, name="named"), "rename that field"),
        (lambda: fm.register_operator(Thawed, name="thawed"), "frozen=True"),
        (lambda: fm.register_part(fm.Problem, name="skip"), "Skip is called 'skip'"),
        (lambda: fm.register_part(nn.Linear, name="linear"), "frozen=True"),
    ],
)
def test_clashes_and_what_is_no_operator_are_refused(register, words):
    before = dict(OPERATORS.classes), dict(PARTS.classes)
    with pytest.raises(fm.MorphError) as caught:
        register()
    assert words in str(caught.value)
    assert (OPERATORS.classes, PARTS.classes) == before


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (Stranger("0"), r"Stranger is not registered; call fastmorph.register_operator\(Stranger, name=...\)"),
        (fm.Deepen, r"Deepen is not a morph but a class; a plan holds its instances, Deepen\(...\)"),
        ("deepen", "'deepen' is not a morph; a plan holds .*Deepen, .*Widen"),
        (5, "5 is not a morph"),
        (None, "None is not a morph"),
    ],
)
def test_what_is_no_morph_is_refused_with_the_remedy(model, operator, words):
    for plan in (operator, [operator]):
        with pytest.raises(fm.MorphError, match=words):
            fm.morph(model, plan)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (Part(), r"register_part\(Part, name=...\)"),
        ({"a": 1}, "use finite numbers"),
        (float("nan"), "use finite numbers"),
        ((1, None), "use finite numbers"),
        ((Between(3), 3), "cannot be written"),
    ],
)
def test_fields_that_no_file_can_hold_are_refused(field, words):
    with pytest.raises(fm.MorphError, match=words):
        fm.Plan([Factor("0", field)]).to_toml()


def test_a_single_operator_is_a_plan(model):
    assert fm.Plan(fm.Deepen("0")) == fm.Plan([fm.Deepen("0")])
    assert len(fm.morph(model, fm.Deepen("0")).steps) == 1
    assert len(fm.Plan(iter([fm.Deepen("0"), fm.Deepen("2")]))) == 2


def test_a_module_in_place_of_its_name_is_told_its_name(model):
    with pytest.raises(fm.MorphError, match="takes the name of a layer, not a Linear: see model"):
        fm.deepen(model, nn.Linear(2, 2))
    with pytest.raises(fm.MorphError, match="not a Linear: its name is '2'"):
        fm.morph(model, fm.Deepen(model[2]))
    with pytest.raises(fm.MorphError, match="not a int"):
        fm.widen(model, {0: 20})


# --- absurd sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator",
    [
        fm.Widen("0", 10**11),
        fm.Widen("0", 10**400),
        fm.Widen("2", 10**11),
        fm.Deepen("0", 10**13),
        fm.Deepen("0", kernel_sizes=(10**20, 3)),
        fm.GrowKernel("0", 10**6),
        fm.GrowKernel("0", (3, 10**20)),
        fm.InsertSubnet("0", fm.Residual(10**14)),
        fm.InsertSubnet("0", fm.Residual(4, 10**9)),
        fm.InsertSubnet("0", fm.Stacked([fm.Skip(), fm.Sequential([(10**15, 3), (None, 1)])])),
        Factor("1", Between(10**15)),
    ],
)
def test_sizes_beyond_all_memory_are_refused_before_anything_is_made(operator):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16), nn.Linear(1, 1))
    for run in (fm.morph, fm.restructure):
        with pytest.raises(fm.MorphError, match=r"^layer '[012]': .* would take .* GB, and there are .* GB in all"):
            run(model, operator)


def test_new_modules_are_weighed_before_their_weights_are_made(model, monkeypatch):
    monkeypatch.setattr(problem, "memory_of", lambda device: 8 * (500 * 5 + 8 * 500 + 9))  # the bias, of 8, was there
    fm.deepen(model, "0", hidden_channels=500)
    with pytest.raises(fm.MorphError, match="layer '0': the Replacement for it would take"):
        fm.deepen(model, "0", hidden_channels=501)


# --- options -----------------------------------------------------------------------------------------------------------------


def test_options_stand_once_and_are_those_of_morph():
    written = {
        name: parameter.annotation
        for name, parameter in inspect.signature(fm.morph).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "optimizer"
    }
    assert {name: known.__forward_arg__ for name, known in fm.Options.__annotations__.items()} == written
    for function in (fm.deepen, fm.widen, fm.grow_kernel, fm.insert_subnet):
        signature = inspect.signature(function)
        assert signature.parameters["options"].annotation == "Unpack[Options]"
        assert (signature.parameters["model"].annotation, signature.return_annotation) == ("M", "M")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (fm.deepen, ("0",)),
        (fm.widen, ({"0": 9},)),
        (fm.grow_kernel, ({"0": 5},)),
        (fm.insert_subnet, ("0", fm.Residual(2))),
        (fm.morph, (fm.Deepen("0"),)),
    ],
)
def test_an_option_that_does_not_exist_is_an_error(model, function, arguments):
    with pytest.raises(TypeError, match="'solvr'"):
        function(model, *arguments, solvr=fm.Auto())
    if function is not fm.morph:
        with pytest.raises(fm.MorphError, match="carry an optimizer over by"):
            function(model, *arguments, optimizer=torch.optim.SGD(model.parameters()))


def test_every_solving_option_reaches_the_equations(model, monkeypatch):
    options = {"solver": fm.Direct(), "backend": "torch", "precision": "float64", "allow_inexact": True, "memory_budget": 2**20}
    reached = []

    def spied(problems, **given):
        reached.append(given)
        return decompose_many(problems, **given)

    decompose_many = equations.decompose_many
    monkeypatch.setattr(equations, "decompose_many", spied)
    fm.deepen(model, "0", **options)
    assert reached
    assert all(options.items() <= given.items() for given in reached)
    with pytest.raises(fm.MorphError, match="precision='float63'"):
        fm.deepen(model, "0", precision="float63")
