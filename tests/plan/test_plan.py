"""Plans as data: every operator, seed and inputs go through TOML unchanged, and what is no plan is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmorph as fm
from fastmorph.equation.randomness import VERSION
from fastmorph.inputs import Inputs

ROW = fm.Sequential([(8, (3, 5), "relu", "batch"), (None, 1)])
OPERATORS = [
    fm.Deepen("a", hidden_channels=12, kernel_sizes=((5, 5), 3), activation="relu", norm="batch"),
    fm.Deepen('blocks."x"\\\n.ü\x7f', kernel_sizes=[[5, 5], 3]),
    fm.Widen("a.first", 24, "zero"),
    fm.GrowKernel("a.first", 5),
    fm.GrowKernel("a.first", [5, 7]),
    fm.InsertSubnet("linear", fm.Sequential([fm.LayerSpec(8, None, "tanh"), (None, [3, 1])])),
    fm.InsertSubnet("b", ROW),
    fm.InsertSubnet("c", fm.Stacked([fm.Sequential([(None, 1)]), fm.Skip(), ROW])),
    fm.InsertSubnet("d", fm.Residual(4)),
    fm.InsertSubnet("e", fm.Residual(8, (1, 3), "gelu", "batch")),
]


@pytest.mark.parametrize("operator", [*OPERATORS])
def test_each_operator_goes_through_toml_unchanged(operator, tmp_path):
    plan = fm.Plan([operator])
    plan.save(tmp_path / "plan.toml")
    again = fm.Plan.load(tmp_path / "plan.toml")
    assert again == plan
    assert hash(again) == hash(plan)


@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
@pytest.mark.parametrize("inputs", [None, [], [((2, 3), "float32"), ((), "int64")]])
def test_seed_and_inputs_go_through_toml_unchanged(seed, inputs):
    plan = fm.Plan(OPERATORS, seed, inputs)
    assert fm.Plan.from_toml(plan.to_toml()) == plan
    assert (plan.seed, len(plan)) == (seed, len(OPERATORS))


def test_a_plan_reads_as_it_is_meant():
    plan = fm.Plan([fm.InsertSubnet("c", fm.Stacked([fm.Sequential([(4, 3, "relu"), (None, 1)]), fm.Skip()]))], 7)
    assert plan.to_toml().splitlines() == [
        "seed = 7",
        f"noise = {VERSION}",
        "",
        "[[morph]]",
        'operator = "insert_subnet"',
        'layer = "c"',
        "[morph.subnet]",
        'kind = "stacked"',
        "[[morph.subnet.branches]]",
        'kind = "sequential"',
        "[[morph.subnet.branches.layers]]",
        "channels = 4",
        "kernel_size = 3",
        'activation = "relu"',
        "[[morph.subnet.branches.layers]]",
        "kernel_size = 1",
        "[[morph.subnet.branches]]",
        'kind = "skip"',
    ]
    inline = 'seed = 7\n[[morph]]\noperator = "insert_subnet"\nlayer = "c"\nsubnet = {kind = "stacked", branches = [{kind = '
    inline += '"sequential", layers = [{channels = 4, kernel_size = 3, activation = "relu"}, {}]}, {kind = "skip"}]}'
    assert fm.Plan.from_toml(inline) == plan


def test_an_empty_plan():
    assert len(fm.Plan.from_toml("")) == 0
    assert fm.Plan.from_toml(fm.Plan([]).to_toml()) == fm.Plan([])


def test_keywords_are_recorded_by_name():
    x, mask = torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool)
    plan = fm.Plan(OPERATORS).recorded(OPERATORS, 7, Inputs((x,), {"mask": mask}))
    assert plan.inputs == (((2, 3), "float32"), ((2,), "bool", "mask"))
    again = fm.Plan.from_toml(plan.to_toml())
    assert again == plan
    args, kwargs = again.example_inputs(nn.Linear(3, 3))
    assert [args[0].shape, list(kwargs), kwargs["mask"].dtype] == [(2, 3), ["mask"], torch.bool]
    unknown = fm.Plan([]).recorded([], 7, Inputs((x,), {"flag": True}))
    assert unknown.inputs is None, "what is no tensor has no shape to record"


def test_inputs_are_made_where_the_model_is():
    plan = fm.Plan([], inputs=[((2, 3), "float64"), ((4,), "int64")])
    with torch.device("meta"):
        (x, i), keywords = plan.example_inputs(nn.Linear(3, 3))
    assert keywords == {}
    assert (x.device.type, x.shape, x.dtype, i.dtype) == ("meta", (2, 3), torch.float64, torch.int64)
    assert fm.Plan([]).example_inputs(nn.Linear(3, 3)) is None


SUBNET = '[[morph]]\noperator = "insert_subnet"\nlayer = "0"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[morph", "not valid TOML"),
        ("x = 1", "[[morph]] tables only"),
        ("morph = 1", "[[morph]] tables only"),
        ("morph = [1]", "[[morph]] tables only"),
        ('[[morph]]\noperator = "exec"\nlayer = "0"', "operator = 'exec'"),
        ('[[morph]]\noperator = "deepen"', "needs layer"),
        ('[[morph]]\noperator = "deepen"\nlayer = "0"\nwidth = 3', "width"),
        ('[[morph]]\noperator = "grow_kernel"\nlayer = "0"', "kernel_size"),
        ('seed = "1"', "seed='1'"),
        ("seed = true", "seed=True"),
        ("seed = -1", "seed=-1"),
        (
            "seed = 7\nnoise = 0",
            "noise=0 of a plan: its seed stands for noise of another version than this fastmorph's, which is 2",
        ),
        ("seed = 7\nnoise = true", "noise=True"),
        ("noise = 1", "run it with the fastmorph that recorded it, or leave noise out to have another child"),
        ('noise = "1"', "noise='1'"),
        ('[[inputs]]\nshape = [1, -2]\ndtype = "float32"', "inputs"),
        ('[[inputs]]\nshape = [1]\ndtype = "float31"', "float31"),
        ('[[inputs]]\nshape = [1]\ndtype = "nn"', "nn"),
        ("[[inputs]]\nshape = [1]", "shape and a dtype"),
        ('[[inputs]]\nshape = [1]\ndtype = "float32"\nname = 3', "keyword's name"),
        ('[[inputs]]\nshape = [1]\ndtype = "float32"\nname = "a b"', "keyword's name"),
        ('[[inputs]]\nshape = [1]\ndtype = "float32"\nkey = "a"', "a name for a keyword"),
        ('[[inputs]]\nshape = [1]\ndtype = "bool"\nname = "a"\n' * 2, "have one name"),
        (SUBNET + 'subnet = {kind = "os"}', "kind = 'os'"),
        (SUBNET + 'subnet = {kind = "skip", branches = []}', "skip in the plan takes nothing"),
        (SUBNET + 'subnet = {kind = "sequential"}', "layers"),
        (
            SUBNET + 'subnet = {kind = "sequential", layers = [{width = 3}]}',
            "layer in the plan takes channels, kernel_size, activation, norm; got width",
        ),
        (SUBNET + 'subnet = {kind = "sequential", layers = 3}', "sequential in the plan"),
        (SUBNET + 'subnet = {kind = "stacked", branches = [3]}', "a Stacked has branches"),
        (SUBNET + 'subnet = {kind = "residual", hidden_channels = 3}', "even"),
    ],
)
def test_what_is_no_plan_is_refused(text, words):
    with pytest.raises(fm.MorphError) as caught:
        fm.Plan.from_toml(text)
    assert words in str(caught.value)


def test_modules_are_not_written_to_files():
    for operator in (fm.Deepen("0", activation=nn.GELU()), fm.InsertSubnet("0", fm.Residual(2, activation=torch.tanh))):
        with pytest.raises(fm.MorphError, match="of layer '0' cannot be written to a file: give the activation by its name"):
            fm.Plan([operator]).to_toml()
    with pytest.raises(fm.MorphError, match="is not a morph"):
        fm.Plan(["deepen"])
