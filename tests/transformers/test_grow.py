"""Models of transformers grown in one line: the same logits and the same generation, out of a checkpoint of the stock class."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators

transformers = pytest.importorskip("transformers")
declare_torchvision_operators()

IDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
VIEW = {key: size for key, size in SIZES.items() if key[0] != "i"} | {"image_size": 8, "patch_size": 4}
LLAMA = SIZES | IDS | {"num_key_value_heads": 2, "max_position_embeddings": 64}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", LLAMA | {"head_dim": 4, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **IDS}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 4, **IDS},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", SIZES | IDS),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", SIZES | IDS),
    "vit": ("ViTConfig", "ViTForImageClassification", SIZES | {"image_size": 8, "patch_size": 4, "num_labels": 3}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES | IDS | {"max_position_embeddings": 64}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        SIZES | IDS | {"ffn_dim": 12, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    ),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", VIEW | {"mlp_ratio": 2}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": SIZES | IDS | {"projection_dim": 8},
            "vision_config": SIZES | {"image_size": 8, "patch_size": 4, "projection_dim": 8},
            "projection_dim": 8,
        },
    ),
}


def made(name: str) -> Any:
    """A model with norms and biases that look trained."""
    config, kind, sizes = CASES[name]
    torch.manual_seed(0)
    more = {"decoder_start_token_id": 0} if name == "t5" else {}
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def call_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if name in ("vit", "dinov2"):
        return pixels
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    more = {"t5": {"decoder_input_ids": ids[:, :4]}, "clip": pixels}
    return {"input_ids": ids, **more.get(name, {})}


def error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


def logits(outputs: Any) -> torch.Tensor:
    return outputs["logits" if "logits" in outputs else "logits_per_image"]


def rounding(model: nn.Module, call: dict[str, torch.Tensor]) -> float:
    """The parent's own: its logits against those of a float64 copy."""
    model.config._experts_implementation = "eager"  # in float64, too
    exact = {key: value.double() if value.is_floating_point() else value for key, value in call.items()}
    with torch.no_grad():
        own = logits(model(**call))
        wide = logits(model.double()(**exact))
    model.float()
    return error(wide, own.double())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "llama",
            {
                "hidden_size": 24,
                "intermediate_size": 17,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "num_hidden_layers": 3,
            },
        ),
        ("qwen3", {"intermediate_size": 19, "num_attention_heads": 6, "num_hidden_layers": 5}),
        ("gpt2", {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 70, "num_hidden_layers": 3}),
        ("t5", {"num_hidden_layers": 3, "num_attention_heads": 5}),
        ("bert", {"intermediate_size": 21}),
        ("mixtral", {"intermediate_size": 20, "num_experts": 8, "hidden_size": 24}),
        ("vit", {"intermediate_size": 21, "num_hidden_layers": 4}),
    ],
)
def test_a_checkpoint_of_the_stock_class(name, sizes, tmp_path):
    parent, call = made(name), call_of(name)
    before = {key: tensor.clone() for key, tensor in parent.state_dict().items()}
    done = fm.transformers.grow(parent, **sizes, generator=0)
    assert done.certificate
    assert type(done.model) is type(parent)
    assert all(torch.equal(tensor, before[key]) for key, tensor in parent.state_dict().items())
    done.model.save_pretrained(tmp_path)
    loaded = type(parent).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted, found = parent(**call).logits, loaded(**call).logits
        assert torch.equal(found, done.model(**call).logits)
    assert error(wanted, found) <= max(2e-6, 4 * rounding(parent, call))
    if parent.can_generate():
        how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(parent.generate(call["input_ids"], **how), loaded.generate(call["input_ids"], **how))
    for size, number in sizes.items():
        assert fm.transformers.recipe(loaded, {size: number + 24}, "pair").operators  # the config says the new sizes
        with pytest.raises(fm.MorphError, match="nothing is to grow"):
            fm.transformers.grow(loaded, **{size: number})


@pytest.mark.parametrize(
    ("name", "fill"),
    [("gpt2", "rotate"), ("neox", None), ("opt", None), ("vit", "rotate"), ("dinov2", None), ("clip", "rotate")],
)
def test_heads_come_along_where_code_divides_the_width_by_their_number(name, fill, tmp_path):
    parent, call = made(name), call_of(name)
    untie = fill == "rotate" and name in ("gpt2", "opt")
    done = fm.transformers.grow(parent, hidden_size=28 if name != "gpt2" else 24, fill=fill, untie=untie, generator=0)
    assert len(done.history.operators) == 1 + untie + (name == "dinov2") * 2  # whose MLP is said by the width
    done.model.save_pretrained(tmp_path)
    loaded = type(parent).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted, found = (logits(model(**call)) for model in (parent, loaded))
    assert error(wanted, found) <= max(2e-6, 4 * rounding(parent, call))
    if parent.can_generate():
        how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(parent.generate(call["input_ids"], **how), loaded.generate(call["input_ids"], **how))
    if name == "clip":  # two towers
        assert loaded.config.text_config.num_attention_heads == 7
        assert loaded.config.vision_config.hidden_size == 16


@pytest.mark.parametrize(("name", "fill"), [("gpt2", "rotate"), ("gpt2", None), ("vit", "rotate"), ("opt", None)])
def test_in_float64_nothing_but_its_rounding_is_left(name, fill):
    parent, call = made(name).double(), call_of(name)
    call = {key: value.double() if value.is_floating_point() else value for key, value in call.items()}
    untie = fill == "rotate" and name == "gpt2"
    child = fm.transformers.grow(
        parent, hidden_size=24, num_hidden_layers=3, intermediate_size=70, fill=fill, untie=untie, generator=0, verify=False
    ).model
    with torch.no_grad():
        assert error(parent(**call).logits, child(**call).logits) <= 1e-12


def test_a_new_vocabulary_keeps_the_old_logits(tmp_path):
    for name in ("llama", "qwen3", "gpt2", "bert"):
        parent, call = made(name), call_of(name)
        done = fm.transformers.grow(parent, vocab_size=47, generator=0)
        done.model.save_pretrained(tmp_path / name)
        loaded = type(parent).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            wanted, found = parent(**call).logits, loaded(**call).logits
        assert found.shape[-1] == 47
        assert error(wanted, found[..., :40]) <= 2e-6  # products may be summed in another order
        assert "the first 40 of 47 ids" in str(done.certificate)
        assert (loaded.get_input_embeddings().weight[40:] != 0).all()


def test_a_fresh_process_without_fastmorph(tmp_path):
    parent, call = made("llama"), call_of("llama")
    done = fm.transformers.grow(parent, num_hidden_layers=3, intermediate_size=20, generator=0)
    done.model.save_pretrained(tmp_path)
    code = (
        "import sys, json\n"
        f"sys.path[:0] = {[path for path in sys.path if 'site-packages' in path]!r}\n"
        "sys.modules['torchvision'] = None\n"
        "import torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"ids = torch.tensor({call['input_ids'].tolist()})\n"
        "assert 'fastmorph' not in sys.modules\n"
        "print(json.dumps(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()))\n"
    )
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=300)
    wanted = parent.generate(call["input_ids"], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert json.loads(found.stdout.splitlines()[-1]) == wanted.tolist()


def test_plans_are_printable_and_the_optimizer_comes_along():
    parent = made("llama")
    optimizer = torch.optim.AdamW(parent.parameters(), 1e-3)
    parent(**call_of("llama"), labels=call_of("llama")["input_ids"]).loss.backward()
    optimizer.step()
    done = fm.transformers.grow(parent, intermediate_size=18, num_hidden_layers=4, optimizer=optimizer, generator=3)
    plan = fm.Plan.from_toml(done.history.to_toml())
    again = fm.morph(parent, plan, verify=False).model
    assert all(torch.equal(one, two) for one, two in zip(done.model.parameters(), again.parameters(), strict=True))
    state = done.optimizer.state[done.model.model.layers[0].mlp.up_proj.weight]
    assert state["exp_avg"].shape == (18, 16)
    losses = []
    for _ in range(20):
        done.optimizer.zero_grad()
        loss = done.model(**call_of("llama"), labels=call_of("llama")["input_ids"]).loss
        loss.backward()
        done.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(*done.model.model.layers[1].mlp.down_proj.weight.chunk(2, 1))


@pytest.mark.parametrize(
    ("name", "sizes", "match"),
    [
        ("llama", {"intermediate_size": 8}, "less than the model's 12: networks grow"),
        ("llama", {"num_attention_heads": 7}, "nearest that works"),
        ("llama", {"num_hidden_layers": 2.5}, "must be an int"),
        ("llama", {}, "nothing is to grow"),
        ("gpt2", {"num_attention_heads": 3}, "cannot (load the child|be made)"),
        ("gpt2", {"num_attention_heads": 4, "hidden_size": 24}, "2 of them at 16 channels are 3 at hidden_size=24"),
        ("gpt2", {"hidden_size": 26}, "the nearest number that works is 24"),
        ("gpt2", {"num_key_value_heads": 4}, "says no num_key_value_heads"),
        ("bert", {"num_hidden_layers": 3}, r"LN\(LN\(x\)\) is not LN\(x\)"),
        ("vit", {"vocab_size": 100}, "says no vocab_size"),
    ],
)
def test_odd_requests_are_refused(name, sizes, match):
    with pytest.raises(fm.MorphError, match=match):
        fm.transformers.grow(made(name), **sizes)


def test_a_tied_head_gets_a_weight_of_its_own(tmp_path):
    parent, call = made("qwen3"), call_of("qwen3")
    done = fm.transformers.grow(parent, vocab_size=44, untie=True, generator=0)
    assert done.model.lm_head.weight is not done.model.model.embed_tokens.weight
    done.model.save_pretrained(tmp_path)
    loaded = type(parent).from_pretrained(tmp_path).eval()
    assert not loaded.config.tie_word_embeddings
    with torch.no_grad():
        assert error(parent(**call).logits, loaded(**call).logits[..., :40]) <= 2e-6
    with pytest.raises(fm.MorphError, match="nothing to untie"):
        fm.transformers.grow(made("llama"), vocab_size=44, untie=True)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_post_norm_network_at_twice_its_width(name, tmp_path):
    parent, call = made(name), call_of(name)
    done = fm.transformers.grow(parent, hidden_size=32, vocab_size=44, fill="pair", untie=True, generator=0)
    done.model.save_pretrained(tmp_path)
    loaded = type(parent).from_pretrained(tmp_path).eval()
    assert (loaded.config.hidden_size, loaded.config.num_attention_heads) == (32, 8)
    with torch.no_grad():
        wanted, found = parent(**call).logits, loaded(**call).logits[..., :40]
    assert error(wanted, found) <= max(2e-6, 4 * rounding(parent, call))


def test_a_bare_encoder_whose_output_is_the_stream():
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 40, "max_position_embeddings": 16}
    model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    call = call_of("bert")
    for fill, cause in (("pair", "they are the model's output"), ("zero", "native_layer_norm"), ("rotate", "gains of a norm")):
        with pytest.raises(fm.MorphError, match=f"layer 'embeddings.word_embeddings' cannot get more channels: .*{cause}"):
            fm.morph(model, fm.Widen("embeddings.word_embeddings", 32, fill), example_inputs=call)
    with pytest.raises(fm.MorphError, match=r"LN\(LN\(x\)\) is not LN\(x\)"):
        fm.morph(model, fm.InsertBlock("encoder.layer.0"), example_inputs=call)
    plan = [
        fm.AddHeads("encoder.layer.0.attention.self", 6),
        fm.AddHeads("encoder.layer.1.attention.self", 7),
        fm.Widen("encoder.layer.*.intermediate.dense", "x1.25"),
        fm.GrowVocabulary("embeddings.word_embeddings", 44),
    ]
    done = fm.morph(model, plan, example_inputs=call, generator=0)
    with torch.no_grad():
        wanted, found = (each(**call).last_hidden_state for each in (model, done.model))
    assert error(wanted, found) <= 2e-6


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(fm.MorphError, match="no model of transformers"):
        fm.transformers.grow(nn.Linear(2, 2), hidden_size=4)
    with pytest.raises(fm.MorphError, match="no size of a transformer"):
        fm.transformers.recipe(made("vit"), {"depth": 4})
