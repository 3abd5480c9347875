"""Heads of attention: more of them, and the network computes what it did."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention import Attention, Blocks, fused, grouped
from torch import nn
from widening import FILLS, Net, randn, trained

import fastmorph as fm

X = randn(2, 7, 5)


def grown(model, operators, fill="pair", x=X):
    """The child, which computes what its parent does to float64's rounding; the parent is what it was."""
    before = copy.deepcopy(model.state_dict())
    operators = [operators] if isinstance(operators, fm.AddHeads) else operators
    child = fm.morph(model, operators, example_inputs=x, generator=0).model
    with torch.no_grad():
        old, new = model(x), child(x)
    # Twins cancel, or columns add up, to a few roundings of each of the heads' entries.
    assert (old - new).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * old.abs().max()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    return child


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "counted"),
    [(8, None, (8, 4, 2)), (6, 3, (6, 3, 2)), (8, 2, (8, 2, 4)), (6, 2, (6, 2, 3)), (9, 3, (9, 3, 3)), (10, None, (10, 5, 2))],
)
def test_grouped_queries(heads, kv_heads, counted, fill):
    model = grouped()
    child = grown(model, fm.AddHeads("blocks.1", heads, kv_heads, fill))
    attention = child.blocks[1]
    assert (attention.n_heads, attention.n_groups, attention.n_rep) == counted
    assert (attention.head_dim, attention.q.out_features, attention.k.out_features) == (6, heads * 6, counted[1] * 6)
    assert attention.out.in_features == heads * 6
    assert attention.q_norm.normalized_shape == (6,)
    assert child.blocks[0].n_heads == 4


def test_twins_and_old_heads_stay_in_place():
    model = grouped(heads=4, groups=4)
    child = grown(model, fm.AddHeads("blocks.0", 6))
    before, after = model.blocks[0], child.blocks[0]
    for name in ("q", "k", "v"):
        old, rows = getattr(before, name).weight, getattr(after, name).weight.unflatten(0, (6, 6))
        assert torch.equal(rows[:4].flatten(0, 1), old)
        assert torch.equal(rows[4], rows[5])
        assert (rows[4] != 0).all()
    columns = after.out.weight.unflatten(1, (6, 6))
    assert torch.equal(columns[:, :4].flatten(1), before.out.weight)
    assert torch.equal(columns[:, 4], -columns[:, 5])
    assert (columns[:, 4] != 0).all()


def test_a_single_head_shares_the_columns_of_an_old_one():
    model = grouped(heads=4, groups=4)
    before, after = model.blocks[0], grown(model, fm.AddHeads("blocks.0", 5)).blocks[0]
    for name in ("q", "k", "v"):
        for kind in ("weight", "bias"):
            old, new = (getattr(getattr(module, name), kind) for module in (before, after))
            assert torch.equal(new[-6:], old[-6:])
    old, one, two = before.out.weight[:, -6:], *after.out.weight[:, -12:].chunk(2, 1)
    assert torch.allclose(one + two, old, rtol=0, atol=4e-16)
    assert ((one - two).abs() > 1e-6 * old.abs().max()).all()


def attention(x, qkv, bias, slopes, proj, shift):
    """`attention.Fused` in numpy, head by head: x (T, d), qkv (3, H, s, d), bias (3, H, s), slopes (H,), proj (d, H, s)."""
    positions = np.arange(len(x))
    out = np.broadcast_to(shift, x.shape).copy()
    for head in range(len(slopes)):
        q, k, v = (x @ qkv[part, head].T + bias[part, head] for part in range(3))
        scores = q @ k.T / np.sqrt(q.shape[1]) - slopes[head] * abs(positions[:, None] - positions)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out += weights / weights.sum(1, keepdims=True) @ v @ proj[:, head].T
    return out


@pytest.mark.parametrize("heads", [5, 6])
def test_against_numpy(heads):
    child = grown(fused(), fm.AddHeads("blocks.0", heads))
    x = randn(7, 12, seed=1).numpy()
    found = []
    for module, count in ((fused().blocks[0], 4), (child.blocks[0], heads)):
        tensors = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
        qkv, bias = tensors["qkv.weight"].reshape(3, count, 6, 12), tensors["qkv.bias"].reshape(3, count, 6)
        proj = tensors["proj.weight"].reshape(12, count, 6)
        found.append(attention(x, qkv, bias, tensors["slopes"], proj, tensors["proj.bias"]))
        inside = module(torch.from_numpy(x)[None])[0].detach().numpy()
        assert np.abs(inside - found[-1]).max() <= 1e-13 * np.abs(inside).max()
    assert np.abs(found[1] - found[0]).max() <= 1e-13 * np.abs(found[0]).max()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("by_head", [False, True])
def test_fused_weights(by_head, fill):
    child = grown(fused(by_head=by_head), [fm.AddHeads("blocks.0", 7, fill=fill), fm.AddHeads("blocks.1.qkv", 6, fill=fill)])
    assert [block.num_heads for block in child.blocks] == [7, 6]
    assert [tuple(block.slopes.shape) for block in child.blocks] == [(7,), (6,)]


def test_many_layers_are_as_one_by_one():
    operators = [fm.AddHeads("blocks.0", 6), fm.AddHeads("blocks.1", 8)]
    model = grouped()
    together = fm.morph(model, operators, example_inputs=X, generator=0)
    apart = fm.morph(model, operators[:1], example_inputs=X, generator=0)
    for name, value in apart.model.blocks[0].state_dict().items():
        assert torch.equal(value, together.model.blocks[0].state_dict()[name])


def test_plans_histories_and_architectures(tmp_path):
    model = grouped()
    plan = fm.Plan(
        [fm.Widen("blocks.0.v", 6 * 2), fm.AddHeads("blocks.0", 6), fm.AddHeads("blocks.1", 6, kv_heads=2, fill="zero")]
    )
    plan.save(tmp_path / "plan.toml")
    assert fm.Plan.load(tmp_path / "plan.toml") == plan
    done = fm.morph(model, plan, example_inputs=X, generator=3)
    again = fm.morph(model, done.history, example_inputs=X).model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in done.model.state_dict().items())
    bare = fm.restructure(copy.deepcopy(model).to("meta"), done.history)
    assert {name: value.shape for name, value in bare.state_dict().items()} == {
        name: value.shape for name, value in done.model.state_dict().items()
    }
    assert (bare.blocks[0].n_heads, bare.blocks[1].n_rep) == (6, 3)


def test_an_optimizer_comes_along():
    model = grouped()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(X).square().mean().backward()
    optimizer.step()
    done = fm.morph(model, fm.AddHeads("blocks.0", 6), example_inputs=X, optimizer=optimizer, generator=0)
    child, state = done.model, done.optimizer.state
    old = optimizer.state[model.blocks[0].q.weight]
    for moment, rest in (("exp_avg", 0.0), ("exp_avg_sq", float(old["exp_avg_sq"].mean()))):
        new = state[child.blocks[0].q.weight][moment]
        assert torch.equal(new[:24], old[moment])
        assert torch.allclose(new[24:], torch.full_like(new[24:], rest))
    for _ in range(3):  # and goes on: new heads leave their twins
        done.optimizer.zero_grad()
        child(X).square().mean().backward()
        done.optimizer.step()
    rows = child.blocks[0].q.weight.unflatten(0, (6, 6))
    assert not torch.equal(rows[4], rows[5])


def test_the_function():
    child = fm.add_heads(grouped(), {"blocks.0": 6, "blocks.1.q": 8}, example_inputs=X, generator=0)
    assert [block.n_heads for block in child.blocks] == [6, 8]


@pytest.mark.parametrize(
    ("layer", "heads", "kv_heads", "sentence"),
    [
        (
            "blocks.0",
            3,
            None,
            "layer 'blocks.0' has 4 heads, and 2 of keys and values: heads=3, kv_heads=None must be at least",
        ),
        ("blocks.0", 8, 1, "kv_heads=1 must be at least that"),
        (
            "blocks.0",
            5,
            None,
            "2 query heads to each .*; the nearest that works is heads=6, kv_heads=3, or .* heads=6, kv_heads=2",
        ),
        ("blocks.0", 8, 8, "would be less, or not equally many"),
        ("blocks.0", True, None, "heads=True must be an int"),
        ("blocks.0.q_norm", 6, None, "layer 'blocks.0.q_norm' has no heads"),
        ("blocks.0.out", 6, None, "layer 'blocks.0.out' has no heads"),
        (
            "blocks",
            6,
            None,
            "layer 'blocks' holds several modules of attention, whose queries come from 'blocks.0.q', 'blocks.1.q'",
        ),
        ("block", 6, None, "the model has no layer 'block'; did you mean 'blocks'"),
    ],
)
def test_refusals(layer, heads, kv_heads, sentence):
    model = grouped()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fm.MorphError, match=sentence):
        fm.morph(model, fm.AddHeads(layer, heads, kv_heads), example_inputs=X)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_an_output_by_head_has_more_of_them_and_the_old_ones_are_compared(kv_heads):
    class Maps(Attention):
        def forward(self, x):
            q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            k = self.k(x).unflatten(-1, (self.n_groups, -1)).transpose(1, 2).repeat_interleave(self.n_rep, 1)
            v = self.v(x).unflatten(-1, (self.n_groups, -1)).transpose(1, 2).repeat_interleave(self.n_rep, 1)
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    model, x = trained(Maps()), randn(2, 7, 12)
    done = fm.morph(model, fm.AddHeads("q", 8, kv_heads), example_inputs=x, generator=0)
    assert done.certificate
    before, after = model(x)[1], done.model(x)[1]
    old = [0, 1, 4, 5] if kv_heads == 2 else [0, 1, 2, 3]  # new query heads stand in their groups
    assert after.shape[1] == 8
    assert torch.allclose(after[:, old], before, rtol=0, atol=1e-14)
    alone = trained(Net(lambda m, x: m.maps(x)[1], maps=Maps()))
    with pytest.raises(fm.MorphError, match=r"they are the model's output|its outputs would have shapes"):
        fm.morph(alone, fm.AddHeads("maps.q", 8, kv_heads), example_inputs=x)


def test_refuses_a_fill_that_there_is_not():
    with pytest.raises(fm.MorphError, match="fill='rotate' must be one of 'pair', 'zero', 'duplicate'"):
        fm.morph(grouped(), fm.AddHeads("blocks.0", 6, fill="rotate"), example_inputs=X)


def test_refuses_heads_that_scores_mix():
    class Talking(nn.Module):
        """Talking heads: a linear map over heads before the softmax."""

        def __init__(self):
            super().__init__()
            self.heads = 4
            self.qkv, self.talk, self.proj = nn.Linear(12, 72), nn.Linear(4, 4), nn.Linear(24, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 6)).permute(2, 0, 3, 1, 4)
            scores = self.talk((q @ k.transpose(-1, -2)).movedim(1, -1)).movedim(-1, 1).softmax(-1)
            return self.proj((scores @ v).transpose(1, 2).flatten(2))

    model = trained(Blocks(Talking()))
    with pytest.raises(fm.MorphError, match=r"layer 'blocks\.0' cannot get more heads: .* let that module take its"):
        fm.morph(model, fm.AddHeads("blocks.0", 6), example_inputs=X)
