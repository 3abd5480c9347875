"""Networks become mixtures of experts, and mixtures get more of them; the model computes what it did."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention import package
from torch import nn
from widening import Net, randn, trained

import fastmorph as fm

X = randn(2, 7, 5)
FILLS = ["pair", "duplicate"]


def swiglu(m, x):
    return m.down(torch.nn.functional.silu(m.gate(x)) * m.up(x))


def network(dtype=torch.float64):
    mlp = Net(swiglu, gate=nn.Linear(6, 10), up=nn.Linear(6, 10), down=nn.Linear(10, 6))
    return trained(
        Net(
            lambda m, x: m.head(m.stem(x) + m.mlp(m.norm(m.stem(x)))),
            stem=nn.Linear(5, 6),
            norm=nn.LayerNorm(6),
            mlp=mlp,
            head=nn.Linear(6, 3),
        ),
        dtype,
    )


def changed(model, operator, x=X, units=64):
    """The child, which computes what its parent does to so many units of rounding; the parent is what it was."""
    before = copy.deepcopy(model.state_dict())
    child = fm.morph(model, operator, example_inputs=x, generator=0).model
    with torch.no_grad():
        old, new = model(x), child(x)
    assert (old - new).abs().max() <= units * torch.finfo(x.dtype).eps * old.abs().max()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    return child


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 1), (5, 3), (1, 1)])
def test_a_network_becomes_a_mixture(experts, top_k, dtype):
    model = network(dtype)
    child = changed(model, fm.AddExperts("mlp", experts, top_k), X.to(dtype))
    assert isinstance(child.mlp, fm.nn.Mixture)
    assert len(child.mlp.experts) == experts
    for expert in child.mlp.experts:
        assert all(torch.equal(value, model.mlp.state_dict()[name]) for name, value in expert.state_dict().items())
    assert child.mlp.router.weight.shape == (experts, 6)
    assert (child.mlp.router.weight != 0).all()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("times", [2, 3])
def test_a_mixture_gets_more(times, fill):
    mixture = changed(network(), fm.AddExperts("mlp", 4, 2))
    for number, expert in enumerate(mixture.mlp.experts):  # as if they had trained
        expert.load_state_dict(trained(expert, seed=number).state_dict())
    child = changed(mixture, fm.AddExperts("mlp", 4 * times, 2 * times, fill))
    assert (len(child.mlp.experts), child.mlp.top_k, child.mlp.router.out_features) == (4 * times, 2 * times, 4 * times)
    copies = torch.stack([expert.down.weight for expert in child.mlp.experts]).unflatten(0, (times, 4))
    old = torch.stack([expert.down.weight for expert in mixture.mlp.experts])
    assert torch.allclose(copies.mean(0), old, rtol=0, atol=1e-15)
    apart = (copies[0] - copies[1]).abs()
    assert (apart > 0).all() if fill == "pair" else not apart.any()


def mixture(x, router, experts, top_k):
    """In numpy, position by position: x (n, d), router (e, d), experts a function each."""
    rows = []
    for row in x:
        logits = router @ row
        chosen = np.argsort(-logits, kind="stable")[:top_k]
        shares = np.exp(logits[chosen] - logits[chosen].max())
        rows.append(sum(share * experts[i](row) for share, i in zip(shares / shares.sum(), chosen, strict=True)))
    return np.array(rows)


def test_the_module_against_numpy():
    experts = [trained(nn.Linear(5, 4), seed=number) for number in range(4)]
    module = fm.nn.Mixture(trained(nn.Linear(5, 4, bias=False), seed=9), experts, 2)
    arrays = [(expert.weight.detach().numpy(), expert.bias.detach().numpy()) for expert in experts]
    maps = [lambda row, w=w, b=b: w @ row + b for w, b in arrays]
    expected = mixture(X.flatten(0, 1).numpy(), module.router.weight.detach().numpy(), maps, 2)
    with torch.no_grad():
        found = module(X)
        module.sparse = False
        whole = module(X)
    for out in (found, whole):
        assert out.shape == (2, 7, 4)
        assert np.abs(out.flatten(0, 1).numpy() - expected).max() <= 1e-14
    module.sparse = True
    module(X).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module(X[:0]).shape == (0, 7, 4)


def test_experts_part_when_they_train():
    child = changed(changed(network(), fm.AddExperts("mlp", 2, 1)), fm.AddExperts("mlp", 4, 2))
    optimizer = torch.optim.SGD(child.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        child(X).square().mean().backward()
        optimizer.step()
    gates = [expert.gate.weight for expert in child.mlp.experts]
    assert not any(torch.equal(gates[0], other) for other in gates[1:])


def test_plans_histories_optimizers_and_architectures(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(X).square().mean().backward()
    optimizer.step()
    plan = fm.Plan([fm.AddExperts("mlp", 4, 2), fm.AddExperts("mlp", 8, 4), fm.Widen("mlp.experts.3.gate", 14)])
    plan.save(tmp_path / "plan.toml")
    assert fm.Plan.load(tmp_path / "plan.toml") == plan
    done = fm.morph(model, plan, example_inputs=X, optimizer=optimizer, generator=3)
    again = fm.morph(model, done.history, example_inputs=X).model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in done.model.state_dict().items())
    bare = fm.restructure(copy.deepcopy(model).to("meta"), done.history)
    assert {name: value.shape for name, value in bare.state_dict().items()} == {
        name: value.shape for name, value in done.model.state_dict().items()
    }
    # At birth an expert of n has 1 / n of the gradient, on average.
    old, state = optimizer.state[model.mlp.up.weight], done.optimizer.state
    for expert in done.model.mlp.experts[:3]:
        new = state[expert.up.weight]
        assert torch.allclose(new["exp_avg"], old["exp_avg"] / 8)
        assert torch.allclose(new["exp_avg_sq"], old["exp_avg_sq"] / 64)
    done.model(X).square().mean().backward()
    done.optimizer.step()


@pytest.mark.parametrize(
    ("layer", "experts", "top_k", "fill", "sentence"),
    [
        ("mlp", 2, 3, "pair", "top_k=3 are more than the 2 experts"),
        ("mlp", 0, 1, "pair", "experts=0 must be an int of at least 1"),
        ("mlp", 2, True, "pair", "top_k=True must be an int"),
        ("mlp", 2, 1, "zero", "fill='zero' must be 'pair' or 'duplicate'"),
        ("mpl", 2, 1, "pair", "the model has no layer 'mpl'; did you mean 'mlp'"),
        ("norm", 2, 1, "pair", "it has no matrix that maps positions"),
        ("moe", 6, 3, "pair", "has 4 experts, 2 to a position: 6 with 3 .*; the nearest that works is experts=8, top_k=4"),
        ("moe", 8, 2, "pair", "8 with 2 would not share them alike"),
        ("mixing", 2, 1, "pair", "it does not map each position by itself"),
        ("bent", 8, 4, "pair", "its shares are no softmax, or an expert is not linear in its last weight"),
        ("cell", 2, 1, "pair", r"it does not run on one tensor of positions|it does not map each position"),
    ],
)
def test_refusals(layer, experts, top_k, fill, sentence):
    model = network()
    model.moe = fm.nn.Mixture(nn.Linear(6, 4), [nn.Linear(6, 6) for _ in range(4)], 2).double()
    model.bent = fm.nn.Mixture(nn.Linear(6, 4), [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)], 2).double()
    model.mixing = trained(Net(lambda m, x: m.inner(x).cumsum(-2), inner=nn.Linear(6, 6)))
    model.cell = nn.GRUCell(6, 6).double()
    with pytest.raises(fm.MorphError, match=sentence):
        fm.morph(model, fm.AddExperts(layer, experts, top_k, fill), example_inputs=X)


def test_the_function():
    child = fm.add_experts(network(), {"mlp": 4}, top_k=2, example_inputs=X, generator=0)
    assert len(child.mlp.experts) == 4


def mixtral():
    transformers = package("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, head_dim=8, num_local_experts=4, initializer_range=0.2)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    return transformers.MixtralForCausalLM(config).eval(), {"input_ids": ids, "use_cache": False}


@pytest.mark.parametrize("fill", FILLS)
def test_stacked_experts_of_transformers(fill, tmp_path):
    model, inputs = mixtral()
    one = fm.morph(model, fm.AddExperts("model.layers.0.mlp", 8, 4, fill), example_inputs=inputs, generator=0)
    done = fm.morph(model, fm.AddExperts("", 8, 4, fill), example_inputs=inputs, generator=0)
    for found in (one, done):
        assert found.certificate.max_rel <= 2e-6
        block = found.model.model.layers[0].mlp
        assert (block.top_k, block.gate.top_k, block.gate.num_experts, block.experts.num_experts) == (4, 4, 8, 8)
        assert block.experts.gate_up_proj.shape == (8, 96, 32)
    assert model.model.layers[0].mlp.gate.num_experts == model.config.num_local_experts == 4
    with pytest.raises(fm.MorphError, match="would write a checkpoint that from_pretrained cannot load"):
        one.model.save_pretrained(tmp_path / "one")
    assert reloaded(done.model, tmp_path / "all", inputs) == 0


def reloaded(child, path, inputs):
    """How far logits are from what they were after saving and loading."""
    child.save_pretrained(path)
    with torch.no_grad():
        return (type(child).from_pretrained(path)(**inputs).logits - child(**inputs).logits).abs().max()


@pytest.mark.parametrize(("kind", "mixed"), [("Llama", "Mixtral"), ("Mistral", "Mixtral"), ("Qwen3", "Qwen3Moe")])
def test_a_decoder_of_transformers_becomes_one_with_experts(kind, mixed, tmp_path):
    transformers = package("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "use_cache": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    done = fm.morph(model, fm.AddExperts("", 4, 2), example_inputs=inputs, optimizer=optimizer, generator=0)
    child = done.model
    assert type(child).__name__ == f"{mixed}ForCausalLM"
    assert done.steps[0].note == f"a {kind}ForCausalLM became a {mixed}ForCausalLM"
    assert done.certificate.max_rel <= 1e-5
    texts = [m.generate(ids[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False) for m in (model, child)]
    assert torch.equal(*texts)
    assert reloaded(child, tmp_path, inputs) == 0
    again = fm.morph(model, done.history, example_inputs=inputs).model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in child.state_dict().items())
    bare = fm.restructure(model, done.history, example_inputs=inputs)
    assert type(bare) is type(child)
    old = [optimizer.state[getattr(model.model.layers[0].mlp, name).weight] for name in ("gate_proj", "up_proj")]
    new = done.optimizer.state[child.model.layers[0].mlp.experts.gate_up_proj]
    for moment, shares in (("exp_avg", 4), ("exp_avg_sq", 16)):
        assert torch.equal(new[moment], (torch.cat([each[moment] for each in old]) / shares).expand(4, -1, -1))
    done.optimizer.step()


def test_what_has_no_class_with_experts_is_refused():
    with pytest.raises(fm.MorphError, match=r"it is a Net, of which no class with experts is known .*; name the MLPs instead"):
        fm.morph(network(), fm.AddExperts("", 4), example_inputs=X)


def test_the_rest_of_mixtral_grows():
    model, inputs = mixtral()
    plan = [fm.AddHeads("model.layers.0.self_attn", 9, 3), fm.Widen("model.layers.0.mlp.experts.gate_up_proj", 112)]
    done = fm.morph(model, plan, example_inputs=inputs, generator=0)
    assert done.certificate.max_rel <= 2e-6
    assert done.model.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 56)
