"""What one run leaves open: other sizes, other arguments, other ranks, parameters that it does not use. All of it counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from widening import FILLS, Net, randn, trained

import fastmorph as fm
from fastmorph.graph import follow


def exact(model, plan, calls, *example, **options):
    """The child computes what the parent does on every one of the calls."""
    given = {"example_inputs": example} if example else {}
    child = fm.morph(model, plan, verify=False, generator=torch.Generator().manual_seed(0), **given, **options).model
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(child(*call), model(*call), rtol=0, atol=1e-12)
    return child


# --- sizes that code compares -------------------------------------------------------------------------------------------------


def branching(decide, width=4):
    def forward(m, x):
        h = torch.relu(m.stem(x))
        return m.head(m.fine(h) if decide(h) else m.coarse(h))

    convs = {name: nn.Conv2d(width, width, 3, padding=1) for name in ("fine", "coarse")}
    return trained(Net(forward, stem=nn.Conv2d(2, width, 1), head=nn.Conv2d(width, 2, 1), **convs))


DECISIONS = {
    "greater": lambda h: h.shape[-1] > 7,
    "method": lambda h: h.size(2) <= 7,
    "computed": lambda h: h.shape[-1] // 2 > 3,
    "odd": lambda h: h.shape[-1] % 2,
    "shapes": lambda h: h.shape[2:] == (7, 7),
    "numel": lambda h: h[0, 0].numel() >= 60,
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("size", [7, 8])
def test_both_branches_of_a_comparison_of_sizes_follow(name, size, fill):
    model = branching(DECISIONS[name])
    calls = [(randn(2, 2, n, n),) for n in (6, 7, 8, 9)]
    child = exact(model, [fm.Widen("stem", 6, fill), fm.Widen("fine", 7, fill)], calls, randn(2, 2, size, size))
    assert child.coarse.out_channels == child.fine.out_channels == child.head.in_channels == 7


def test_a_branch_that_returns_the_channels_keeps_them():
    model = Net(
        lambda m, x: m.conv(x) if x.shape[-1] > 7 else m.other(m.conv(x)), conv=nn.Conv2d(2, 4, 1), other=nn.Conv2d(4, 2, 1)
    )
    with pytest.raises(fm.MorphError, match="layer 'conv' cannot get more channels: they are the model's output"):
        fm.widen(trained(model), {"conv": 6}, example_inputs=randn(1, 2, 5, 5))


def test_branches_in_branches():
    def forward(m, x):
        h = m.stem(x)
        if h.shape[-1] > 7:
            h = m.fine(h)
            if h.shape[-1] > 8:
                h = m.finer(h)
        return m.head(h)

    convs = {name: nn.Conv2d(4, 4, 1) for name in ("fine", "finer")}
    model = trained(Net(forward, stem=nn.Conv2d(2, 4, 1), head=nn.Conv2d(4, 2, 1), **convs))
    child = exact(model, [fm.Widen("stem", 6)], [(randn(1, 2, n, n),) for n in (6, 8, 10)], randn(1, 2, 6, 6))
    assert (child.fine.in_channels, child.finer.out_channels) == (6, child.head.in_channels)


def test_assertions_and_loops_are_no_branches():
    def forward(m, x):
        assert x.shape[-1] == x.shape[-2], "square"
        h = m.stem(x)
        while h.shape[-1] > 4:
            h = nn.functional.max_pool2d(m.again(h), 2)
        return m.head(h)

    convs = {"stem": nn.Conv2d(2, 4, 1), "again": nn.Conv2d(4, 4, 1), "head": nn.Conv2d(4, 2, 1)}
    model = trained(Net(forward, **convs))
    exact(model, [fm.Widen("stem", 6)], [(randn(1, 2, n, n),) for n in (4, 9, 20)], randn(1, 2, 9, 9))


def test_a_model_that_compares_nothing_runs_once():
    model = trained(nn.Sequential(nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1)))
    assert len(follow(model, randn(1, 2, 5, 5)).record.runs) == 1


def test_sizes_are_numbers_to_all_else():
    def forward(m, x):
        n, _, h, w = x.shape
        y = m.one(x).reshape(n, -1, h * w).unflatten(2, (x.size(2), w))
        y = nn.functional.interpolate(y, size=x.shape[2:]) + torch.arange(w).to(y) / {w: w}[x.shape[3]]
        return m.two(y)[:, :, : h - 1].expand(n, -1, -1, w)

    model = trained(Net(forward, one=nn.Conv2d(2, 4, 1), two=nn.Conv2d(4, 2, 1)))
    exact(model, [fm.Widen("one", 6)], [(randn(2, 2, 5, 5),)], randn(2, 2, 5, 5))


# --- optional arguments -------------------------------------------------------------------------------------------------------


def optional(function):
    def forward(self, x, y=None):
        return self.head(function(self, torch.relu(self.one(x)), y))

    made = {"one": nn.Linear(3, 4), "two": nn.Linear(7, 4), "head": nn.Linear(4, 2)}
    kind = type("Optional", (nn.Module,), {"forward": forward})
    model = kind()
    for name, module in made.items():
        setattr(model, name, module)
    return trained(model)


@pytest.mark.parametrize("fill", FILLS)
def test_an_argument_that_the_example_gives_may_be_left_out(fill):
    model = optional(lambda m, h, y: h if y is None else m.two(y))
    x, y = randn(5, 3), randn(5, 7)
    child = exact(model, [fm.Widen("two", 6, fill)], [(x,), (x, y)], x, y)
    assert child.one.out_features == 6


def test_an_argument_that_the_example_does_not_give():
    model, x = optional(lambda m, h, y: h if y is None else h + m.two(y)), randn(5, 3)
    with pytest.raises(fm.MorphError, match=r"did not use 'two.*' when it was run, .*; pass example_inputs= under which"):
        fm.widen(model, {"one": 6}, example_inputs=x)
    exact(model, [fm.Widen("one", 6)], [(x,), (x, randn(5, 7))], x, randn(5, 7))


def test_an_argument_that_would_meet_the_channels():
    model, x = optional(lambda m, h, y: h if y is None else h + y), randn(5, 3)
    del model.two
    with pytest.raises(
        fm.MorphError, match="'one' cannot get more channels: where 'y' is given, which example_inputs= does not"
    ):
        fm.widen(model, {"one": 6}, example_inputs=x)


def flagged(function, annotation):
    model = optional(function)
    forward = type(model).forward
    forward.__annotations__["y"] = annotation
    return model


@pytest.mark.parametrize("annotation", [bool | None, "bool | None", "Optional[bool]"])
def test_an_argument_that_says_it_is_a_bool_is_given_as_one(annotation):
    model, x = flagged(lambda m, h, y: h.view(-1, 2, 2).flatten(1) if y else h, annotation), randn(5, 3)
    del model.two
    with pytest.raises(fm.MorphError, match="'one' cannot get more channels: the model itself fails with RuntimeError"):
        fm.widen(model, {"one": 6}, example_inputs=x)
    model = flagged(lambda m, h, y: h.sigmoid() if y else h, annotation)
    del model.two
    exact(model, [fm.Widen("one", 6)], [(x,), (x, True)], x)


# --- parameters that no run uses ----------------------------------------------------------------------------------------------


def test_a_layer_that_is_never_used_is_told_where_it_is_as_wide():
    model = trained(Net(lambda m, x: m.two(m.one(x)), one=nn.Linear(3, 4), two=nn.Linear(4, 2), spare=nn.Linear(5, 4)))
    with pytest.raises(
        fm.MorphError, match=r"'one' cannot get more channels: the model did not use 'spare\.\w+' .* take it out"
    ):
        fm.widen(model, {"one": 6}, example_inputs=randn(5, 3))
    model.spare = nn.Linear(5, 7)
    exact(model.double(), [fm.Widen("one", 6)], [(randn(5, 3),)], randn(5, 3))


def test_an_auxiliary_head_is_used_in_train_mode():
    def forward(m, x):
        h = m.one(x)
        return (m.two(h), m.aux(h)) if m.training else m.two(h)

    model = trained(Net(forward, one=nn.Linear(3, 4), two=nn.Linear(4, 2), aux=nn.Linear(4, 2)))
    assert fm.widen(model, {"one": 6}, example_inputs=randn(5, 3)).aux.in_features == 6


# --- guessed inputs -----------------------------------------------------------------------------------------------------------


def test_a_guess_of_the_wrong_rank_is_none():
    """On vectors, PyTorch refuses a softmax over dimension 2, which tensors without values take."""
    model = trained(Net(lambda m, x: m.two(torch.softmax(m.one(x), 2)), one=nn.Linear(3, 4), two=nn.Linear(4, 2)))
    assert follow(model).inputs.args[0].ndim == 3
    with pytest.raises(fm.MorphError, match="takes softmax over them"):
        fm.widen(model, {"one": 6})


def test_one_image_or_a_batch_of_them():
    """A mean over dimension 0 is one over channels where a single image is meant."""
    model = trained(Net(lambda m, x: m.two(m.one(x) - m.one(x).mean(0)), one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 2, 1)))
    exact(model, [fm.Widen("one", 6)], [(randn(2, 3, 5, 5),)], randn(2, 3, 5, 5))
    child = exact(model, [fm.Widen("one", 8)], [(randn(2, 3, 5, 5),), (randn(3, 5, 5),)])
    assert child.one.out_channels == 8
    with pytest.raises(fm.MorphError, match="the nearest number that works is 8"):
        fm.widen(model, {"one": 6})


def test_vectors_or_sequences_of_them():
    model = trained(
        Net(lambda m, x: m.two(m.one(x) - m.one(x).mean(1, keepdim=True)), one=nn.Linear(3, 4), two=nn.Linear(4, 2))
    )
    exact(model, [fm.Widen("one", 6)], [(randn(2, 7, 3),)], randn(2, 7, 3))
    exact(model, [fm.Widen("one", 8)], [(randn(2, 3),), (randn(2, 7, 3),)])


def test_the_guess_that_uses_all_parameters():
    def forward(m, x):
        return m.head(m.mix(m.one(x)) if x.ndim == 3 else m.one(x))

    model = trained(Net(forward, one=nn.Linear(3, 4), mix=nn.Linear(4, 4), head=nn.Linear(4, 2)))
    child = exact(model, [fm.Widen("one", 6)], [(randn(2, 3),), (randn(2, 7, 3),)])
    assert child.mix.in_features == child.head.in_features == 6


def test_a_layer_that_mixes_positions_tells_their_number():
    def forward(m, x):
        return m.head(m.mix(m.one(x).transpose(1, 2)).transpose(1, 2))

    model = trained(Net(forward, one=nn.Linear(3, 4), mix=nn.Linear(7, 7), head=nn.Linear(4, 2)))
    exact(model, [fm.Widen("one", 6)], [(randn(2, 7, 3),)])
