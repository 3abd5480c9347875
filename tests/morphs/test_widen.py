"""Widening is exact through every structure that networks are made of, with every fill."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widening import FILLS, Net, randn, trained, widened

import fastmorph as fm


def residual():
    return Net(
        lambda m, x: m.head(F.relu(m.stem(x) + m.norm(m.inner(F.gelu(m.stem(x))))).mean((2, 3))),
        stem=nn.Conv2d(3, 6, 3, padding=1),
        inner=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(6),
        head=nn.Linear(6, 4),
    )


def concatenation():
    def forward(m, x):
        a = torch.sigmoid(m.one(x))
        b = torch.cat([x, a, m.two(torch.cat([a, x], 1))], 1)
        return m.head(m.norm(b).flatten(1))

    return Net(forward, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(7, 5, 1), norm=nn.BatchNorm2d(12), head=nn.Linear(12 * 64, 4))


def squeeze_and_excite():
    def forward(m, x):
        x = F.hardswish(m.stem(x))
        x = x * F.hardsigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.head(x)

    layers = {"stem": nn.Conv2d(3, 6, 3), "down": nn.Conv2d(6, 2, 1), "up": nn.Conv2d(2, 6, 1)}
    return Net(forward, **layers, head=nn.Conv2d(6, 2, 3))


def depthwise():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 12, 3, groups=6), nn.MaxPool2d(2), nn.Dropout2d(), nn.Conv2d(12, 4, 1)),
    )


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.Tanh(),
        nn.Conv2d(12, 8, 1, groups=2),
        nn.Conv2d(8, 4, 1),
    )


def channel_shuffle():
    def forward(m, x):
        x = F.relu(m.one(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.three(torch.relu(m.two(F.channel_shuffle(x, 2))))

    return Net(forward, one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(8, 8, 3, groups=8), three=nn.Conv2d(8, 4, 1))


def gated_halves():
    def forward(m, x):
        a, b = m.up(x).chunk(2, -1)
        return m.down(F.glu(m.both(a * torch.sigmoid(b))))

    return Net(forward, up=nn.Linear(5, 12), both=nn.Linear(6, 8), down=nn.Linear(4, 3))


def flattened():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.PReLU(5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 7), nn.PReLU(), nn.Linear(7, 4)
    )


def upsampling():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, stride=2), nn.ConvTranspose2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.ConvTranspose2d(8, 4, 3, groups=2), nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.Conv2d(1, 2, 3)),
    )


def scales():
    def forward(m, x):
        y = m.one(x) * m.gamma[:, None, None]
        return m.two(m.list[0].view(1, -1, 1, 1) + F.pad(y, (1, 1, 1, 1)) + m.scalar) @ m.matrix

    values = {"gamma": nn.Parameter(torch.ones(6)), "scalar": nn.Parameter(torch.ones(1))}
    matrix, parameters = nn.Parameter(torch.ones(10, 4)), nn.ParameterList([nn.Parameter(torch.ones(6))])
    return Net(forward, one=nn.Conv2d(3, 6, 1), two=nn.Conv2d(6, 2, 1), list=parameters, matrix=matrix, **values)


def sequences():
    def forward(m, x):
        x = m.embed(x.abs().long() % 7)
        x = x + m.position
        return m.out(F.relu(m.mix(x.transpose(1, 2)).transpose(1, 2)))

    embed, position = nn.Embedding(7, 6), nn.Parameter(torch.ones(1, 5, 6))
    return Net(forward, embed=embed, position=position, mix=nn.Conv1d(6, 8, 3, padding=1), out=nn.Linear(8, 3))


def last_one_apart():
    def forward(m, x):
        x = torch.relu(m.one(x))
        x = torch.cat([x[:, :-1], x[:, -1:] * 0.5 + 1], 1)
        x[:, -2] = 0
        return m.two(x + x.flip(1))

    return Net(forward, one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(8, 2, 1))


def last_one_only():
    return Net(
        lambda m, x: m.two(torch.cat([m.one(x)[:, :-1], m.one(x)[:, -1:].exp()], 1)),
        one=nn.Conv2d(3, 6, 1),
        two=nn.Conv2d(6, 2, 1),
    )


CASES = {
    last_one_apart: {"one": 10},
    last_one_only: {"one": 9},
    residual: {"inner": 9},
    concatenation: {"one": 7, "two": 6},
    squeeze_and_excite: {"stem": 9, "down": 5},
    depthwise: {"0": 8, "2": 9, "5": 20},
    grouped: {"0": 16, "2": 20, "4": 12},
    channel_shuffle: {"one": 16},
    gated_halves: {"up": 18, "both": 10},
    flattened: {"0": 7, "4": 12},
    upsampling: {"0": 9, "1": 12},
    scales: {"one": 9},
    sequences: {"embed": 8, "mix": 11},
}
INPUTS = {gated_halves: (2, 5), sequences: (2, 5)}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_exact(make, fill):
    torch.manual_seed(0)
    model, x = trained(make()), randn(*INPUTS.get(make, (2, 3, 8, 8)))
    child = widened(model, CASES[make], x, fill=fill)
    layer, width = list(CASES[make].items())[-1]  # the last: it may have widened others along with it
    module = child.get_submodule(layer)
    assert width in [getattr(module, name, None) for name in ("out_channels", "out_features", "embedding_dim")]


def test_float32():
    model = trained(squeeze_and_excite(), torch.float32)
    widened(model, {"stem": 24, "down": 8}, randn(2, 3, 8, 8).float())


def test_layers_know_their_new_sizes():
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1))
    )
    child = widened(model, {"0": 6}, randn(2, 3, 4, 4))
    assert (child[0].out_channels, child[1].num_features, child[2].num_parameters) == (6, 6, 6)
    assert (child[3].in_channels, child[3].out_channels, child[3].groups, child[4].in_channels) == (6, 6, 6, 6)


def test_the_child_is_trainable_and_twins_part():
    torch.manual_seed(0)
    model = trained(residual())
    child, x = widened(model, {"stem": 10}, randn(2, 3, 8, 8)), randn(2, 3, 8, 8)
    rows = child.stem.weight[6:]
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[3])
    optimizer = torch.optim.SGD(child.parameters(), lr=0.1)
    child.train()(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in child.parameters())
    optimizer.step()
    assert not torch.equal(child.stem.weight[6], child.stem.weight[8])


def test_a_weight_by_its_own_name():
    model = trained(
        Net(
            lambda m, x: torch.relu(x @ m.first) @ m.second,
            first=nn.Parameter(torch.ones(3, 4)),
            second=nn.Parameter(torch.ones(4, 2)),
        )
    )
    child = widened(model, {"first": 7}, randn(5, 3))
    assert child.second.shape == (7, 2)
    with pytest.raises(fm.MorphError, match="several weights; name one of 'first', 'second'"):
        fm.widen(model, {"": 7}, example_inputs=randn(5, 3))


def test_tied_weights_stay_tied():
    model = Net(
        lambda m, x: m.out(torch.relu(m.two(torch.relu(m.one(x))))),
        one=nn.Linear(4, 4),
        two=nn.Linear(4, 4),
        out=nn.Linear(4, 2),
    )
    model.two.weight = model.one.weight
    with pytest.raises(fm.MorphError, match="belong to no layer"):  # its columns read the input, too
        fm.widen(trained(model), {"two": 6}, example_inputs=randn(3, 4))
    twice = Net(
        lambda m, x: m.out(m.body(torch.relu(m.body(m.stem(x))))),
        stem=nn.Linear(3, 4),
        body=nn.Linear(4, 4),
        out=nn.Linear(4, 2),
    )
    twice.again = nn.Module()
    twice.again.weight = twice.body.weight
    for fill in FILLS:
        child = widened(trained(twice), {"body": 7}, randn(3, 3), fill=fill)
        assert child.again.weight is child.body.weight


def test_frozen_parts_stay_frozen():
    model = trained(residual())
    model.stem.requires_grad_(False)
    child = widened(model, {"stem": 8}, randn(2, 3, 8, 8))
    assert [p.requires_grad for p in child.parameters()] == [p.requires_grad for p in model.parameters()]


def test_one_seed_gives_one_child():
    model = trained(residual())
    one, two = (widened(model, {"stem": 9}, randn(2, 3, 8, 8)).state_dict() for _ in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_inputs_are_guessed():
    convolutions, linear = trained(residual(), torch.float32), trained(nn.Sequential(*flattened()[4:]), torch.float32)
    for model, layer in ((convolutions, "stem"), (linear, "0")):
        child = fm.widen(model, {layer: 16})
        assert child.get_submodule(layer).weight.shape[0] == 16
    with pytest.raises(fm.MorphError, match=r"could not be guessed from its first layer .*; pass example_inputs="):
        fm.widen(trained(Net(lambda m, x, y: m.one(x), one=nn.Linear(3, 3))), {"one": 4})


def test_structure_alone():
    model = trained(residual())
    plan = [fm.Widen("stem", 9)]
    child = fm.morph(model, plan, example_inputs=randn(2, 3, 8, 8)).model
    again = fm.restructure(copy.deepcopy(model).to("meta"), plan)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in child.state_dict().items()}
