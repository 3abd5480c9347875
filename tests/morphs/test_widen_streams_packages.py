"""Streams of other people's transformers at 1.375 times their width, in float32, with norms and biases that look trained."""

from __future__ import annotations

import pytest
import torch
from test_add_heads_packages import BOUND, GENERATE, MODELS, build

import fastmorph as fm

# What writes the stream, and by which fills it grows; the head is tied where the fill is "zero" alone.
STREAMS = {
    "llama": ("model.embed_tokens", ["zero", "rotate"]),
    "qwen3": ("model.embed_tokens", ["zero", "rotate"]),
    "gemma3": ("model.embed_tokens", ["zero"]),
    "mistral": ("model.embed_tokens", ["rotate"]),
    "neox": ("gpt_neox.embed_in", ["zero", "rotate"]),
    "opt": ("model.decoder.embed_tokens", ["zero"]),
    "t5": ("shared", ["zero"]),
    "dinov2": ("dinov2.embeddings.patch_embeddings.projection", ["zero", "rotate"]),
    "vit": ("vit.embeddings.patch_embeddings.projection", ["zero", "rotate"]),
}


@pytest.mark.parametrize(("name", "fill"), [(name, fill) for name, (_, fills) in STREAMS.items() for fill in fills])
def test_transformers(name, fill):
    model, _, inputs = build(name)
    done = fm.morph(model, fm.Widen(STREAMS[name][0], 44, fill), example_inputs=inputs, generator=0, verify=False)
    certificate = fm.verify(model, done.model, kwargs=inputs, readings=done.readings)
    assert certificate
    assert certificate.max_rel <= max(BOUND, *(4 * (row.noise or 0.0) for row in certificate.rows)), certificate
    if name == "gemma3":  # it multiplies embeddings by the root of the width, which is the new one's
        assert done.model.model.embed_tokens.embed_scale == 44**0.5
        assert torch.equal(done.model.model.embed_tokens.weight[:, :32], model.model.embed_tokens.weight)
    if name in GENERATE:
        prompt = {key: value[:1] for key, value in inputs.items() if key != "use_cache"}
        texts = [m.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False) for m in (model, done.model)]
        assert torch.equal(*texts)


def test_what_makes_no_stream():
    """Norms behind sums; the certificate of an encoder would have nothing to hold on to."""
    for name, layer in (("bert", "bert.embeddings.word_embeddings"),):
        model, _, inputs = build(name)
        with pytest.raises(fm.MorphError, match="needs new channels that are the mean of the old ones, and these are zero"):
            fm.widen(model, {layer: 44}, fill="zero", example_inputs=inputs)
    assert set(STREAMS) <= set(MODELS)
