"""More heads in other people's attention, in float32, with norms and biases that look trained."""

from __future__ import annotations

import pytest
import torch
from attention import package
from torch import nn

import fastmorph as fm

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
SOUND = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(5))
# Relative to the largest output, as the certificate has it: twins differ by their own rounding, which columns of noise carry.
BOUND = 2e-6

_TEXT = {"vocab_size": 97, "max_position_embeddings": 64}
_WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_TEXT, **_WIDTH, "num_key_value_heads": 2, "head_dim": 8}
_OPT = {**_TEXT, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
_WHISPER = {
    **{"vocab_size": 97, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 10},
    **{"max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
_CAUSAL = {"input_ids": IDS}  # and caches come out, too
_SEQUENCES = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5], "use_cache": False}
_SPEECH = {"input_features": SOUND, "decoder_input_ids": IDS[:, :5]}
# Class, sizes, the module of attention of layer 0, inputs.
MODELS = {
    "llama": ("LlamaForCausalLM", _GROUPED, "model.layers.0.self_attn", _CAUSAL),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED, "model.layers.0.self_attn", _CAUSAL),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "sliding_window": 4}, "model.layers.0.self_attn", _CAUSAL),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 4}, "model.layers.0.self_attn", _CAUSAL),
    "neox": ("GPTNeoXForCausalLM", {**_TEXT, **_WIDTH}, "gpt_neox.layers.0.attention", _CAUSAL),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "transformer.h.0.attn",
        _CAUSAL,
    ),
    "opt": ("OPTForCausalLM", _OPT, "model.decoder.layers.0.self_attn", _CAUSAL),
    "bert": ("BertForMaskedLM", {**_TEXT, **_WIDTH}, "bert.encoder.layer.0.attention", {"input_ids": IDS}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 97, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "decoder.block.0.layer.0.SelfAttention",
        _SEQUENCES,
    ),
    "whisper": ("WhisperForConditionalGeneration", _WHISPER, "model.decoder.layers.1.encoder_attn", _SPEECH),
    "vit": (
        "ViTForImageClassification",
        {**_WIDTH, "image_size": 32, "patch_size": 8, "num_labels": 5},
        "vit.layers.0.attention",
        {"pixel_values": IMAGES},
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        {**{k: v for k, v in _WIDTH.items() if k != "intermediate_size"}, "image_size": 32, "patch_size": 8, "num_labels": 5},
        "dinov2.encoder.layer.1.attention",
        {"pixel_values": IMAGES},
    ),
}
GENERATE = ("llama", "qwen3", "gemma3", "mistral", "neox", "gpt2", "opt", "t5", "whisper")


def look_trained(model: nn.Module) -> nn.Module:
    """Vectors that differ from channel to channel, and tables of positions that are no noise beside the rest."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise + 0.5 if "norm" in name.lower() and name.endswith("weight") else 0.4 * noise - 0.2)
            elif "position" in name or "relative" in name:
                parameter.copy_(noise - 0.5)
            elif not name.endswith("lm_head.weight"):
                parameter.mul_(3.0)
    return model.eval()


def build(name):
    transformers = package("transformers")
    kind, sizes, layer, inputs = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return look_trained(cls(cls.config_class(**sizes))), layer, inputs


@pytest.mark.parametrize("name", MODELS)
def test_transformers(name):
    model, layer, inputs = build(name)
    grouped = "num_key_value_heads" in MODELS[name][1]
    # Three query heads to each of keys and values instead of two, and four of these instead of two; else twins and one more.
    heads, kv_heads = (12, 4) if grouped else (7, None)
    done = fm.morph(model, fm.AddHeads(layer, heads, kv_heads), example_inputs=inputs, generator=0)
    assert done.certificate
    assert done.certificate.max_rel <= max(BOUND, *(4 * (row.noise or 0.0) for row in done.certificate.rows))
    if name in GENERATE:
        prompt = {key: value[:1] for key, value in inputs.items() if key != "use_cache"}
        texts = [m.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False) for m in (model, done.model)]
        assert torch.equal(*texts)


def test_caches_have_more_heads_and_the_old_ones_are_compared():
    model, layer, inputs = build("llama")
    done = fm.morph(model, fm.AddHeads(layer, 6), example_inputs=inputs, generator=0)
    keys = [m(**inputs).past_key_values.layers[0].keys for m in (model, done.model)]
    assert [each.shape[1] for each in keys] == [2, 3]
    assert torch.equal(keys[0], keys[1][:, :2])
    assert "the old heads of past_key_values.layers.0.keys, past_key_values.layers.0.values" in str(done.certificate)


def test_t5_shares_a_table_of_positions():
    model, _, inputs = build("t5")
    child = fm.add_heads(model, {"encoder.block.1.layer.0.SelfAttention": 6}, example_inputs=inputs, generator=0)
    blocks = [block.layer[0].SelfAttention for block in child.encoder.block]
    assert [block.n_heads for block in blocks] == [6, 6]
    assert blocks[0].relative_attention_bias.weight.shape == (32, 6)
    assert child.decoder.block[0].layer[0].SelfAttention.n_heads == 4


def test_t5_cross_attention_grows_in_one_plan():
    model, _, inputs = build("t5")
    layers = [f"decoder.block.{number}.layer.1.EncDecAttention" for number in (0, 1)]
    with pytest.raises(fm.MorphError, match="add heads in one plan to all modules that share something"):
        fm.add_heads(model, {layers[1]: 6}, example_inputs=inputs)
    child = fm.add_heads(model, dict.fromkeys(layers, 6), example_inputs=inputs, generator=0)
    assert [child.get_submodule(layer).n_heads for layer in layers] == [6, 6]


@pytest.mark.parametrize("heads", [5, 6])
@pytest.mark.parametrize(
    ("name", "sizes", "layer"),
    [
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "qk_norm": True},
            "blocks.0.attn",
        ),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (4, 8)},
            "layers.0.blocks.1.attn",
        ),
    ],
)
def test_timm(name, sizes, layer, heads):
    torch.manual_seed(0)
    model = look_trained(package("timm").create_model(name, num_classes=5, **sizes))
    done = fm.morph(model, fm.AddHeads(layer, heads), example_inputs=IMAGES, generator=0)
    assert done.certificate.max_rel <= BOUND
    attention, before = done.model.get_submodule(layer), model.get_submodule(layer)
    assert attention.num_heads == heads
    if hasattr(before, "relative_position_bias_table"):  # a column for each head, and windows as they were
        assert attention.relative_position_bias_table.shape == (49, heads)
        assert attention.window_size == before.window_size == (4, 4)
