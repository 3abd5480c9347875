"""Where a config says a head's size by width / heads, the stream and the heads grow in proportion, in one plan."""

from __future__ import annotations

import pytest
import torch
from test_add_heads_packages import build

import fastmorph as fm

# Of each: the embedding, all modules of attention, and what the config then says.
CASES = {
    "gpt2": ("transformer.wte", "transformer.h.*.attn", {"n_embd": 40, "n_head": 5, "n_inner": 128}),
    "opt": (
        "model.decoder.embed_tokens",
        "model.decoder.layers.*.self_attn",
        {"hidden_size": 40, "word_embed_proj_dim": 40, "num_attention_heads": 5},
    ),
    "neox": ("gpt_neox.embed_in", "gpt_neox.layers.*.attention", {"hidden_size": 40, "num_attention_heads": 5}),
}


@pytest.mark.parametrize("name", CASES)
def test_width_and_an_odd_number_of_heads(name, tmp_path):
    model, _, inputs = build(name)
    embedding, attention, said = CASES[name]
    plan = [fm.Widen(embedding, 40, fill="zero"), fm.AddHeads(attention, 5)]
    done = fm.morph(model, plan, example_inputs=inputs, generator=0)
    assert done.certificate.max_rel <= 2e-6
    child = done.model
    vars(child).pop("save_pretrained", None)  # refused as long as the config says what it said
    for key, value in said.items():
        setattr(child.config, key, value)
    child.save_pretrained(tmp_path)
    stock = type(child).from_pretrained(tmp_path).eval()
    texts = [m.generate(inputs["input_ids"][:1], max_new_tokens=8, min_new_tokens=8, do_sample=False) for m in (model, stock)]
    assert torch.equal(*texts)
    with torch.no_grad():
        old, new = (m(**inputs).logits for m in (model, stock))
    assert (old - new).abs().max() <= 2e-6 * old.abs().max()
