"""Every way to grow a transformer, on small configs of many architectures: exact with its error, or refused and why.

`make zoo ZOO=--transformers` writes `bench/zoo/transformers.md`: each child is saved, loaded by its stock class, and compared
with its parent: logits, and what is generated greedily with the cache.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators
from fastmorph.transformers.example import example_call

PAGE = Path(__file__).with_name("transformers.md")
IDS = 50
_TOKENS = {"vocab_size": IDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BODY = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
_PICTURE = {"image_size": 16, "patch_size": 4}
_DECODER = _BODY | _TOKENS | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_TIED = _BODY | {"num_attention_heads": 8}  # heads are as large as code divides the width: both grow in proportion
_BERT = _TIED | _TOKENS | {"max_position_embeddings": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64, "n_inner": 40} | _TOKENS
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0} | _TOKENS
_OPT = {"hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 8, "word_embed_proj_dim": 32} | _TOKENS
_SIDE = ("layers", "attention_heads", "ffn_dim")
_SOUND = {f"{part}_{key}": size for part in ("encoder", "decoder") for key, size in zip(_SIDE, (2, 8, 40), strict=True)}
_SOUND |= {
    "d_model": 32,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
}
_TEXT = _BERT | {"projection_dim": 16}
_DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_labels": 5, "mlp_ratio": 2}
_CLIP = {"text_config": _TEXT, "vision_config": _TIED | _PICTURE | {"projection_dim": 16}, "projection_dim": 16}

# By name: the config's class, the model's, the config, and whether its code divides the width by the number of heads.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER, False),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER | {"head_dim": 8}, False),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _DECODER | {"head_dim": 8, "sliding_window": 4}, False),
    "Mistral": ("MistralConfig", "MistralForCausalLM", _DECODER | {"sliding_window": 4}, False),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", _DECODER | {"num_local_experts": 4}, False),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", _GPT2, True),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _BERT, True),
    "OPT": ("OPTConfig", "OPTForCausalLM", _OPT | {"max_position_embeddings": 64}, True),
    "BERT": ("BertConfig", "BertForMaskedLM", _BERT, True),
    "RoBERTa": ("RobertaConfig", "RobertaForMaskedLM", _BERT, True),
    "T5": ("T5Config", "T5ForConditionalGeneration", _T5, False),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _SOUND | _TOKENS, True),
    "ViT": ("ViTConfig", "ViTForImageClassification", _TIED | _PICTURE | {"num_labels": 5}, True),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", _DINO | _PICTURE, True),
    "CLIP": ("CLIPConfig", "CLIPModel", _CLIP, True),
}
GROWTHS: dict[str, dict[str, Any]] = {
    "width x1.375": {"hidden_size": 44},
    "width, rotated": {"hidden_size": 44, "fill": "rotate"},
    "width x2": {"hidden_size": 64, "fill": "pair"},
    "heads": {"num_attention_heads": 8},
    "KV groups": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "MLP": {"intermediate_size": 96},
    "depth": {"num_hidden_layers": 3},
    "vocabulary": {"vocab_size": 57},
    "experts": {"num_experts": 8},
}
_UNTIED = ("width, rotated", "width x2")  # which need a head of its own


@dataclass(frozen=True)
class Found:
    """What became of one growth: "exact", "refused", "wrong", or "none" that is asked for, with the error of the logits, the
    parent's own, and a word.
    """

    outcome: str
    error: float = 0.0
    rounding: float = 0.0
    detail: str = ""


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model in eval mode whose norms and biases look trained, and a call of it."""
    import transformers

    config, kind, sizes, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            level = float(parameter.detach().flatten()[0])
            if bool((parameter == level).all()):
                parameter.add_((torch.rand_like(parameter) - 0.5) * (1.0 if level >= 0.5 else 0.2))
            elif parameter.ndim > 1:
                parameter.mul_(2)
    return model, example_call(model)


def grown(name: str, growth: str) -> Found:
    """Grow, save, load, compare."""
    if growth == "heads" and ARCHITECTURES[name][3]:
        return Found("none", detail="with the width")
    model, call = build(name)
    tied = (
        growth in _UNTIED and model.get_output_embeddings() is not None and model.config.get_text_config().tie_word_embeddings
    )
    try:
        done = fm.transformers.grow(model, **GROWTHS[growth], untie=tied, generator=0, verify=False)  # which follows here
    except fm.MorphError as error:
        return Found("refused", detail=" ".join(str(error).split()))
    with tempfile.TemporaryDirectory() as folder:
        done.model.save_pretrained(folder)
        kind = type(done.model)
        loaded = kind.from_pretrained(folder).eval()
    wanted, found = _logits(model, call), _logits(loaded, call)
    error = _difference(wanted, found[..., : wanted.shape[-1]])
    own = _difference(_exact(model, call), wanted.double())
    detail = "untied" if tied else "" if type(model) is kind else f"becomes {kind.__name__}"
    if model.can_generate() and not _alike(model, loaded, call):
        return Found("wrong", error, own, "other tokens are generated")
    return Found("exact" if error <= max(2e-6, 4 * own) else "wrong", error, own, detail)


def _logits(model: Any, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = model(**call)
    return outputs["logits" if "logits" in outputs else "logits_per_image"]


def _exact(model: Any, call: dict[str, Tensor]) -> Tensor:
    """The logits in float64, but for what code computes in float32."""
    model.config._experts_implementation = "eager"
    found = _logits(
        model.double(), {key: value.double() if value.is_floating_point() else value for key, value in call.items()}
    )
    model.float()
    return found


def _difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


def _alike(parent: Any, child: Any, call: dict[str, Tensor]) -> bool:
    """Whether both generate the same, of the parent's ids."""
    inputs = {key: value for key, value in call.items() if not key.startswith("decoder")}
    ids = child.config.get_text_config(decoder=True).vocab_size
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    new = {"suppress_tokens": list(range(IDS, ids))} if ids > IDS else {}
    return torch.equal(parent.generate(**inputs, **how), child.generate(**inputs, **how, **new))


def page(results: dict[str, dict[str, Found]]) -> Iterator[str]:
    """The lines of the page."""
    yield "# Transformers: every architecture, every way to grow"
    yield ""
    yield "`make zoo ZOO=--transformers` wrote this. Small configs with random weights, norms and biases that look trained,"
    yield "in float32. A figure is the largest difference of the logits of the saved and loaded child, over its largest value,"
    yield "beside the parent's own rounding; exact is at most 2e-6, or 4 times that. Models that generate generate the same"
    yield "tokens. Width goes from 32 to 44 and 64, with heads in proportion where code divides it by their number; untied is"
    yield "what has its head untied first. Refusals are below."
    yield ""
    yield f"| | {' | '.join(GROWTHS)} |"
    yield f"|---|{'---|' * len(GROWTHS)}"
    reasons: dict[str, int] = {}
    for name, row in results.items():
        yield f"| {name} | {' | '.join(_cell(found, reasons) for found in row.values())} |"
    yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason}"


def _cell(found: Found, reasons: dict[str, int]) -> str:
    if found.outcome == "none":
        return found.detail
    if found.outcome == "refused":
        return f"refused ({reasons.setdefault(found.detail, len(reasons) + 1)})"
    told = f"{found.error:.0e} ({found.rounding:.0e})" + (f", {found.detail}" if found.detail else "")
    return told if found.outcome == "exact" else f"**wrong** {told}"


def run(names: list[str] | None = None) -> int:
    """Try everything and write the page; 1 if anything was wrong."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    declare_torchvision_operators()
    results: dict[str, dict[str, Found]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names or ARCHITECTURES:
            results[name] = {}
            for growth in GROWTHS:
                found = results[name][growth] = grown(name, growth)
                print(f"{name}, {growth}: {found.outcome} {found.error:.1e} {found.detail}", flush=True)
    text = "\n".join(page(results)) + "\n"
    if names is None:
        PAGE.write_text(text, encoding="utf-8")
    return int(any(found.outcome == "wrong" for row in results.values() for found in row.values()))
