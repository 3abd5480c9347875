"""A stream grows with the heads of attention that reads it, where code divides the width by their number."""

from __future__ import annotations

import copy

import pytest
import torch
from attention import package
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from widening import Net, randn, trained

import fastmorph as fm

D, HEADS = 16, 4  # heads of 4 channels
X = randn(2, 7, 5)


class Causal(nn.Module):
    """As small GPTs are written: the size of a head is computed as it runs, and what comes out is viewed as the width."""

    def __init__(self, norm=False):
        super().__init__()
        self.n_head, self.n_embd = HEADS, D
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm = nn.RMSNorm(D // HEADS, eps=1e-2) if norm else nn.Identity()

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for t in (q, k, v))
        scores = self.norm(q) @ k.transpose(-2, -1) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(torch.ones(length, length).tril() == 0, float("-inf"))
        y = scores.softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Grouped(nn.Module):
    """Two query heads to each of keys and values, in the fused operator."""

    def __init__(self):
        super().__init__()
        self.width, self.heads, self.groups = D, HEADS, HEADS // 2
        self.q, self.k, self.v, self.o = (nn.Linear(D, rows) for rows in (D, D // 2, D // 2, D))

    def forward(self, x):
        size = self.width // self.heads
        q = self.q(x).unflatten(-1, (self.heads, size)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (self.groups, size)).transpose(1, 2) for layer in (self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:-1], self.width))


class Torch(nn.Module):
    """PyTorch's own, which checks its sizes."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Network(nn.Module):
    """A stem, pre-norm blocks, a head."""

    def __init__(self, *attention, norm=nn.LayerNorm):
        super().__init__()
        self.stem, self.head, self.last = nn.Linear(5, D), nn.Linear(D, 3), norm(D, eps=1e-2)
        self.attention = nn.ModuleList(attention)
        self.norms = nn.ModuleList(norm(D, eps=1e-2) for _ in range(2 * len(attention)))
        self.mlps = nn.ModuleList(nn.ModuleList([nn.Linear(D, 10), nn.Linear(10, D)]) for _ in attention)

    def forward(self, x):
        x = self.stem(x)
        for one, two, attention, (up, down) in zip(self.norms[::2], self.norms[1::2], self.attention, self.mlps, strict=True):
            x = x + attention(one(x))
            x = x + down(gelu(up(two(x))))
        return self.head(self.last(x))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(D, HEADS, 10, 0.0, batch_first=True, **options)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return trained(
        Net(
            lambda m, x: m.head(m.last(m.layers(m.stem(x)))),
            stem=nn.Linear(5, D),
            layers=layers,
            last=nn.LayerNorm(D),
            head=nn.Linear(D, 3),
        )
    )


MODELS = {
    "causal": lambda: trained(Network(Causal(), Causal())),
    "causal, norms over heads": lambda: trained(Network(Causal(norm=True), norm=nn.RMSNorm)),
    "grouped": lambda: trained(Network(Grouped(), Causal())),
    "nn.MultiheadAttention": lambda: trained(Network(Torch(), Torch())),
    "nn.TransformerEncoderLayer": lambda: encoder(norm_first=True),
}


def grown(model, channels, fill="zero", x=X, **options):
    """The child, which computes what its parent does to float64's rounding; the parent is what it was."""
    before = copy.deepcopy(model.state_dict())
    done = fm.morph(model, fm.Widen("stem", channels, fill, heads=True), example_inputs=x, generator=0, **options)
    assert done.certificate
    with torch.no_grad():
        old, new = model(x), done.model(x)
    assert (old - new).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * old.abs().max()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    return done


@pytest.mark.parametrize("fill", ["zero", "rotate"])
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("causal", 28),
        ("causal, norms over heads", 20),
        ("grouped", 24),
        ("nn.MultiheadAttention", 28),
        ("nn.TransformerEncoderLayer", 24),
    ],
)
def test_width_and_heads(name, channels, fill):
    child = grown(MODELS[name](), channels, fill).model
    shapes = {key: tuple(value.shape) for key, value in child.state_dict().items()}
    assert not any(D in shape for shape in shapes.values())
    for module in child.modules():
        if isinstance(module, Causal):
            assert (module.n_head, module.n_embd) == (channels // 4, channels)
        if isinstance(module, Grouped):
            assert (module.width, module.heads, module.groups) == (channels, channels // 4, channels // 8)
        if isinstance(module, nn.MultiheadAttention):
            assert (module.num_heads, module.embed_dim, module.head_dim) == (channels // 4, channels, 4)


def test_new_heads_are_twins_and_one_is_left_over():
    child = grown(MODELS["causal"](), 28).model.attention[0]  # 4 heads, and 3 new ones
    rows, columns = child.c_attn.weight.unflatten(0, (3, 7, 4)), child.c_proj.weight.unflatten(1, (7, 4))[:16]
    one, two = next((i, j) for i in (4, 5, 6) for j in (4, 5, 6) if i < j and torch.equal(rows[:, i], rows[:, j]))
    assert torch.equal(columns[:, one], -columns[:, two])
    (alone,) = {4, 5, 6} - {one, two}
    assert torch.equal(rows[:, alone], rows[:, 3])
    assert (columns[:, [one, two, alone]] != 0).all()
    assert (rows != 0).all()


def test_plans_histories_architectures_and_optimizers(tmp_path):
    model = MODELS["causal"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(X).square().mean().backward()
    optimizer.step()
    done = grown(model, 24, optimizer=optimizer)
    done.history.save(tmp_path / "plan.toml")
    plan = fm.Plan.load(tmp_path / "plan.toml")
    assert plan.operators[0].heads
    again = fm.morph(model, plan, example_inputs=X).model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in done.model.state_dict().items())
    bare = fm.restructure(copy.deepcopy(model).to("meta"), done.history)
    assert {name: value.shape for name, value in bare.state_dict().items()} == {
        name: value.shape for name, value in done.model.state_dict().items()
    }
    state = done.optimizer.state[done.model.attention[0].c_attn.weight]
    assert state["exp_avg"].shape == (72, 24)
    old = optimizer.state[model.attention[0].c_attn.weight]["exp_avg"]
    assert torch.allclose(state["exp_avg"].unflatten(0, (3, 24))[:, :16, :16].flatten(0, 1), old, rtol=1e-12)
    for _ in range(2):
        done.optimizer.zero_grad()
        done.model(X).square().mean().backward()
        done.optimizer.step()
    rows = done.model.attention[0].c_attn.weight.unflatten(0, (3, 6, 4))
    assert not torch.equal(rows[:, 4], rows[:, 5])


class Mixed(Causal):
    """Does something with all heads at once."""

    def __init__(self, does):
        super().__init__()
        self.does = does
        self.gain = nn.Parameter(torch.ones(D)) if "normalises" in does else None

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        if self.does == "normalises":
            q = q * (q.pow(2).mean(-1, keepdim=True) + 1e-2).rsqrt() * self.gain
        if self.does == "normalises by a layer":
            q = nn.functional.rms_norm(q, (self.n_embd,), self.gain, 1e-2)
        q, k, v = (t.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = scaled_dot_product_attention(q, k, v)
        if self.does == "divides":
            y = y / self.n_head
        if self.does == "subtracts":
            y = y - y.mean(1, keepdim=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


@pytest.mark.parametrize(
    ("does", "sentence"),
    [
        ("normalises", "module 'attention.0' normalises over them and over others"),
        ("normalises by a layer", "module 'attention.0' normalises over them and over others"),
        ("subtracts", "module 'attention.0' normalises over them and over others"),
    ],
)
def test_refuses_what_is_done_with_all_heads_at_once(does, sentence):
    with pytest.raises(fm.MorphError, match=f"layer 'stem' cannot get more .*{sentence}"):
        grown(trained(Network(Mixed(does))), 24)


def test_a_division_by_the_number_of_heads_is_made_up_for():
    model = trained(Network(Mixed("divides")))
    child = grown(model, 24).model
    old, new = model.attention[0].c_proj.weight, child.attention[0].c_proj.weight[:D, :D]
    assert torch.allclose(new, old * (24 / 16) ** 1.5, rtol=1e-12)  # the stream's root of 24 / 16, and 6 heads for 4


@pytest.mark.parametrize(
    ("model", "channels", "fill", "sentence"),
    [
        ("causal", 26, "zero", "4 heads to 16 channels; the nearest number that works is 24"),
        ("grouped", 28, "zero", "2 heads to 16 channels; the nearest number that works is (24|32)"),
        ("causal", 24, "pair", "heads=True takes fill='zero' or 'rotate'"),
        (lambda: encoder(norm_first=False), 24, "zero", "needs new channels that are the mean of the old ones"),
        (lambda: trained(Network(nn.Linear(D, D))), 24, "zero", "no attention reads its channels"),
        (lambda: trained(Net(lambda m, x: m.head(m.stem(x)), stem=nn.Linear(5, D), head=nn.Linear(D, 3))), 24, "zero", "heads"),
    ],
)
def test_refusals(model, channels, fill, sentence):
    with pytest.raises(fm.MorphError, match=sentence):
        grown(MODELS[model]() if isinstance(model, str) else model(), channels, fill)


def test_without_heads_such_code_does_not_run():
    with pytest.raises(fm.MorphError, match="heads=True"):
        fm.widen(MODELS["nn.MultiheadAttention"](), {"stem": 24}, fill="zero", example_inputs=X)


def test_caches_by_head():
    transformers = package("transformers")
    sizes = {"n_embd": D, "n_layer": 2, "n_head": HEADS, "n_positions": 16, "vocab_size": 11}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))
    plan = fm.Widen("transformer.wte", 20, "zero", heads=True)
    done = fm.morph(model, plan, example_inputs={"input_ids": ids, "use_cache": True}, generator=0)
    assert "old heads of" in str(done.certificate)
    assert done.model.transformer.h[0].attn.num_heads == 5
