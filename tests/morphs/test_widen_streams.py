"""Streams of channels that norms read grow to any width: transformers written by hand, in float64 against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention
from widening import trained

import fastmorph as fm

D, WIDER, TOKENS = 32, 44, 23  # 1.375 times as wide


class RMSNorm(nn.Module):
    """By hand, with an eps that counts; `offset` as Gemma has it."""

    def __init__(self, dim, offset=0.0, weight=True):
        super().__init__()
        self.offset, self.weight = offset, nn.Parameter(torch.ones(dim)) if weight else None

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
        return x if self.weight is None else (x * (self.offset + self.weight) if self.offset else self.weight * x)


class CentredNorm(nn.Module):
    """LayerNorm by hand."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-2)) + self.bias


class VarianceNorm(CentredNorm):
    """The same with a variance."""

    def forward(self, x):
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * (variance + 1e-2).rsqrt() * self.weight + self.bias


class LengthNorm(RMSNorm):
    """By the length of vectors, which has no eps that counts; the root of the width is kept as a number."""

    def __init__(self, dim):
        super().__init__(dim)
        self.scale = dim**0.5

    def forward(self, x):
        return normalize(x, dim=-1) * self.scale * self.weight


NORMS = {
    "rms": RMSNorm,
    "rms, 1 + w": lambda dim: RMSNorm(dim, 1.0),
    "rms without gains": lambda dim: RMSNorm(dim, weight=False),
    "nn.RMSNorm": lambda dim: nn.RMSNorm(dim, eps=1e-2),
    "length": LengthNorm,
    "layer": lambda dim: nn.LayerNorm(dim, eps=1e-2),
    "layer without bias": lambda dim: nn.LayerNorm(dim, eps=1e-2, bias=False),
    "layer without gains": lambda dim: nn.LayerNorm(dim, eps=1e-2, elementwise_affine=False),
    "centred": CentredNorm,
    "variance": VarianceNorm,
}


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    """Pre-norm: attention with heads of 8 channels, then an MLP."""

    def __init__(self, dim, norm, scale=nn.Identity, sandwich=False, bias=True):
        super().__init__()
        self.norm1, self.norm2, self.scale1, self.scale2 = norm(dim), norm(dim), scale(dim), scale(dim)
        self.behind = norm(dim) if sandwich else nn.Identity()
        self.q, self.k, self.v, self.o = (nn.Linear(*sizes, bias=bias) for sizes in 3 * [(dim, 16)] + [(16, dim)])
        self.up, self.down = nn.Linear(dim, 40, bias=bias), nn.Linear(40, dim, bias=bias)

    def forward(self, x, context=None):
        y = self.norm1(x)
        q, k, v = (
            layer(given).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer, given in (
                (self.q, y),
                (self.k, y if context is None else context),
                (self.v, y if context is None else context),
            )
        )
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale1(self.behind(self.o(attended)))
        return x + self.scale2(self.down(gelu(self.up(self.norm2(x)))))


class Language(nn.Module):
    """Tokens, learned positions, two blocks, a head."""

    def __init__(self, norm, tied=False, factor=None, **options):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, D), nn.Parameter(torch.zeros(1, 9, D))
        self.blocks = nn.ModuleList(Block(D, norm, **options) for _ in range(2))
        self.norm, self.head = norm(D), nn.Linear(D, TOKENS, bias=False)
        self.factor = factor
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        if self.factor is not None:
            x = x * self.factor
        x = x + self.positions[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.randint(TOKENS, (2, 9), generator=torch.Generator().manual_seed(0))


def grown(model, layer="tokens", fill="zero", inputs=IDS, width=WIDER, **options):
    """The finished plan; the child is within rounding of its parent, and not one bit of that has changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fm.morph(model, fm.Widen(layer, width, fill), example_inputs=inputs, generator=3, verify=False, **options)
    certificate = fm.verify(model, found.model, inputs, tolerance=1e-12, readings=found.readings)
    assert certificate, certificate
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


@pytest.mark.parametrize("fill", ["zero", "rotate"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_stream_of_any_norm(norm, fill):
    model = trained(Language(NORMS[norm]))
    child = grown(model, fill=fill).model
    assert child.head.weight.shape == (TOKENS, WIDER)
    assert child.blocks[1].o.weight.shape == (WIDER, 16)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if "without gains" not in norm])
def test_ties_are_kept(norm):
    child = grown(trained(Language(NORMS[norm], tied=True))).model
    assert child.head.weight is child.tokens.weight
    with pytest.raises(fm.MorphError, match=r"tokens.weight' both makes them and sums over them .a tied weight.*untie=True"):
        fm.widen(trained(Language(NORMS[norm], tied=True)), {"tokens": WIDER}, fill="rotate", example_inputs=IDS)


def test_a_tie_around_a_norm_without_gains_is_refused():
    """The embedding must be times s, the head over s."""
    with pytest.raises(fm.MorphError, match="module 'head' runs mm on them, which needs them in another size"):
        fm.widen(trained(Language(NORMS["rms without gains"], tied=True)), {"tokens": WIDER}, fill="zero", example_inputs=IDS)


@pytest.mark.parametrize("fill", ["zero", "rotate"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gains_behind_layers_count(norm, fill):
    child = grown(trained(Language(NORMS[norm], scale=LayerScale)), fill=fill).model
    assert (child.blocks[0].scale1.weight != 0).all()


@pytest.mark.parametrize("norm", ["layer", "centred", "variance"])
def test_biases_beside_small_gains_and_gains_of_zero(norm):
    """No quotient of the two is taken that would drown the rest: the error is no larger than with gains of one."""
    models = [trained(Translation(NORMS[norm])), trained(Translation(NORMS[norm]))]
    optimizer = averages(models[1], output="logits")
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[::3], parameter[1::3] = 0, parameter[1::3] * 1e-9
    found = grown(models[1], fill="rotate", optimizer=optimizer)
    state = found.optimizer.state[found.model.head.weight]["exp_avg_sq"]
    assert state.isfinite().all()
    assert (state > 0).all()
    child = grown(models[0], fill="rotate").model
    with torch.no_grad():
        pairs = ((models[1], found.model), (models[0], child))
        errors = [float((one(IDS)["logits"] - two(IDS)["logits"]).abs().max()) for one, two in pairs]
    assert errors[0] <= 4 * max(errors[1], 1e-15)
    assert all((parameter != 0).all() for name, parameter in found.model.named_parameters())
    grown(models[1], fill="rotate", width=D + 1)  # one new channel holds the constant


def test_norms_behind_layers():
    """Sandwich norms: their gains stay, and the stream cannot be turned behind them. Around a mean, they make no mean."""
    model = trained(Language(NORMS["rms"], sandwich=True))
    child = grown(model).model
    assert torch.equal(child.blocks[0].behind.weight[:D], model.blocks[0].behind.weight)
    with pytest.raises(fm.MorphError, match=r"'blocks.0' runs add on them, which adds to the stream what the gains of a norm"):
        fm.widen(model, {"tokens": WIDER}, fill="rotate", example_inputs=IDS)
    with pytest.raises(
        fm.MorphError, match=r"needs new channels that are zero, and these are the mean of the old ones|mean of"
    ):
        fm.widen(trained(Language(NORMS["layer"], sandwich=True)), {"tokens": WIDER}, fill="zero", example_inputs=IDS)


@pytest.mark.parametrize("fill", ["zero", "rotate"])
def test_a_root_of_the_width_that_multiplies_embeddings(fill):
    """It becomes the root of the new width, which is what a model made at that width has; the embeddings stay."""
    model = trained(Language(NORMS["rms, 1 + w"], factor=D**0.5))
    child = grown(model, fill=fill).model
    assert child.factor == WIDER**0.5
    if fill == "zero":
        assert torch.equal(child.tokens.weight[:, :D], model.tokens.weight)


def test_what_the_fills_promise():
    """Zero: old rows times s, new ones zero, gains over s. Mean: new rows the mean. Turned: no entry is zero."""
    s = (WIDER / D) ** 0.5
    model = trained(Language(NORMS["rms"]))
    child = grown(model).model
    torch.testing.assert_close(child.tokens.weight, torch.cat([s * model.tokens.weight, torch.zeros(TOKENS, WIDER - D)], 1))
    torch.testing.assert_close(child.norm.weight[:D], model.norm.weight / s)
    assert torch.equal(child.head.weight[:, :D], model.head.weight)
    assert child.head.weight[:, D:].std() > 0.3 * model.head.weight.std()
    turned = grown(model, fill="rotate").model
    for name, parameter in turned.named_parameters():
        assert (parameter != 0).all(), name
    model = trained(Language(NORMS["layer"]))
    weight = grown(model).model.blocks[0].down.weight
    torch.testing.assert_close(weight[D:], s * model.blocks[0].down.weight.mean(0).expand(WIDER - D, -1))


class Pictures(nn.Module):
    """Patches by a convolution, a class token, positions; a pooled class token that no norm reads."""

    def __init__(self, norm, pooled):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, D, 4, stride=4), nn.Parameter(torch.zeros(1, 1, D))
        self.positions, self.block = nn.Parameter(torch.zeros(1, 5, D)), Block(D, norm)
        self.norm, self.pooled = norm(D), pooled
        self.head = nn.Linear(2 * D if pooled == "both" else D, 7)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.block(x)
        if self.pooled == "mean":
            return self.head(x.mean(1))
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1) if self.pooled == "both" else x[:, 0])


@pytest.mark.parametrize("fill", ["zero", "rotate"])
@pytest.mark.parametrize("pooled", ["token", "mean", "both"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_patches_tokens_and_poolers(norm, pooled, fill):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = trained(Pictures(NORMS[norm], pooled))
    if pooled == "mean":
        model.norm = nn.Identity()
    child = grown(model, "patches", fill, images).model
    assert child.patches.out_channels == WIDER
    assert child.head.in_features == (2 * WIDER if pooled == "both" else WIDER)


class Translation(nn.Module):
    """An encoder and a decoder that reads it by cross attention, of one embedding; returns what the encoder returned, too."""

    def __init__(self, norm):
        super().__init__()
        self.tokens, self.encoder, self.decoder = nn.Embedding(TOKENS, D), Block(D, norm), Block(D, norm)
        self.norms, self.head = nn.ModuleList([norm(D), norm(D)]), nn.Linear(D, TOKENS)

    def forward(self, ids):
        encoded = self.norms[0](self.encoder(self.tokens(ids)))
        return {"logits": self.head(self.norms[1](self.decoder(self.tokens(ids), encoded))), "encoded": encoded}


@pytest.mark.parametrize("fill", ["zero", "rotate"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_outputs_as_wide_as_the_stream(norm, fill):
    """They have changed, and the certificate says so; on the old channels they are what they were."""
    model = trained(Translation(NORMS[norm]))
    found = grown(model, fill=fill)
    assert found.model(IDS)["encoded"].shape[-1] == WIDER
    assert (
        f"the {D} old ones of {WIDER} channels of encoded, which have changed"
        in fm.verify(model, found.model, IDS, readings=found.readings).on
    )
    assert not fm.verify(model, found.model, IDS)


def test_a_model_whose_only_output_is_the_stream_is_refused():
    encoder = trained(nn.Sequential(nn.Embedding(TOKENS, D), Block(D, RMSNorm), RMSNorm(D)))
    for fill in ("zero", "rotate"):
        with pytest.raises(fm.MorphError, match="cannot get more channels: they are the model's output"):
            fm.widen(encoder, {"0": WIDER}, fill=fill, example_inputs=IDS)
    fm.widen(encoder, {"1.up": 50}, example_inputs=IDS)  # everything else grows


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(TOKENS, D), nn.Linear(D, 40), nn.Linear(40, D)
        self.norms, self.head = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)]), nn.Linear(D, TOKENS)

    def forward(self, ids):
        x = self.norms[0](self.tokens(ids))
        return self.head(self.norms[1](x + self.down(gelu(self.up(x)))))


def test_norms_in_the_stream_allow_whole_multiples():
    model = trained(PostNorm())
    with pytest.raises(fm.MorphError, match=r"'norms.1' runs native_layer_norm on them, which needs .*; the nearest .* is 64"):
        fm.widen(model, {"tokens": WIDER}, fill="zero", example_inputs=IDS)
    grown(model, width=2 * D)


def test_other_fills_name_those_of_any_width():
    for tied, cause in ((False, "normalised together, .* the nearest number that works is 64"), (True, "a tied weight")):
        model = trained(Language(NORMS["rms"], tied=tied))
        with pytest.raises(fm.MorphError, match=rf"{cause}.*; fill='zero' allows any number, and so does fill='rotate'"):
            fm.widen(model, {"tokens": WIDER}, example_inputs=IDS)


@pytest.mark.parametrize("fill", ["zero", "rotate"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_histories_replay_and_architectures_are_made_again(norm, fill):
    model = trained(Language(NORMS[norm], scale=LayerScale, factor=D**0.5))
    found = grown(model, fill=fill)
    again = fm.morph(model, found.history, example_inputs=IDS, verify=False).model
    empty = fm.restructure(model, found.history, example_inputs=IDS)
    assert empty.factor == again.factor == found.model.factor
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert empty.state_dict()[name].shape == value.shape
    consumed = fm.morph(copy.deepcopy(model), found.history, example_inputs=IDS, consume=True).model
    assert all(torch.equal(value, consumed.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_widths_of_a_plan_that_meet_in_a_stream():
    plan = [
        fm.Widen("blocks.0.up", 48),
        fm.Widen("tokens", WIDER, "zero"),
        fm.Widen("blocks.1.up", 47),
        fm.Widen("tokens", 50, "rotate"),
    ]
    model = trained(Language(NORMS["rms"]))
    found = fm.morph(model, plan, example_inputs=IDS, generator=0, verify=False)
    assert fm.verify(model, found.model, IDS, tolerance=1e-12)
    assert found.model.head.in_features == 50


def averages(model, seed=0, output=None):
    """An AdamW after two steps, with averages of gradients that differ from entry to entry."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        torch.manual_seed(seed + step)
        optimizer.zero_grad()
        out = model(IDS)
        ((out if output is None else out[output]).tanh() * torch.randn(2, 9, TOKENS)).sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("fill", ["zero", "rotate"])
def test_moments_follow_as_gradients_do(fill):
    """f'(W') = f(W) for W' = s P W: the gradient of W' along P is that of W over s. So it is for readers, over their gains."""
    model = trained(Language(NORMS["rms"]))
    optimizer = averages(model)
    child, moved = (found := grown(model, fill=fill, optimizer=optimizer)).model, found.optimizer
    s = (WIDER / D) ** 0.5
    old, new = optimizer.state[model.tokens.weight], moved.state[child.tokens.weight]
    assert new["step"] == old["step"]
    # <m', W'> = <m, W>: what a step of the size of the average does to the loss, to first order.
    for name in ("tokens", "head", "blocks.0.o", "blocks.1.up", "blocks.1.down"):
        before, after = model.get_submodule(name).weight, child.get_submodule(name).weight
        inner = (optimizer.state[before]["exp_avg"] * before).sum()
        torch.testing.assert_close((moved.state[after]["exp_avg"] * after).sum(), inner, rtol=1e-9, atol=1e-12)
        assert (moved.state[after]["exp_avg_sq"] > 0).all() or name == "tokens"  # of which some were not seen
    if fill == "zero":
        torch.testing.assert_close(new["exp_avg"], torch.cat([old["exp_avg"] / s, torch.zeros(TOKENS, WIDER - D)], 1))
        torch.testing.assert_close(new["exp_avg_sq"][:, :D], old["exp_avg_sq"] / s**2)


class Told(nn.Module):
    """A head's output, and a number that is taken from it or from its weight."""

    def __init__(self, number):
        super().__init__()
        self.body, self.head, self.number = nn.Linear(5, 6), nn.Linear(6, 4), number

    def forward(self, x):
        y = self.head(torch.relu(self.body(x)))
        return y, self.number(self, y)


@pytest.mark.parametrize("number", [lambda m, y: y.mean(), lambda m, y: m.head.weight.square().sum(), lambda m, y: y.mean(1)])
@pytest.mark.parametrize("fill", ["zero", "rotate"])
def test_an_output_beside_a_number_is_no_stream(number, fill):
    with pytest.raises(fm.MorphError, match=r"layer 'head' cannot (get more|have 7) channels"):
        fm.widen(Told(number), {"head": 7}, fill=fill, example_inputs=torch.randn(3, 5))
