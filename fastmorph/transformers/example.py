"""A small call of a model of transformers, to follow it and to compare it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 8  # of sequences of ids
_TEXT = 64  # most ids of a text


def example_call(model: Any, *, cached: bool = True) -> dict[str, Any]:
    """Keywords of a call: random ids, pixels or features, always the same, by what the model takes first and its config.

    Without `cached`, a model that generates keeps no keys and values.
    """
    generator = torch.Generator().manual_seed(0)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    config: Any = model.config
    vision = getattr(config, "vision_config", config)

    def ids() -> Tensor:
        embeddings = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        count = getattr(text, "vocab_size", None) or max(embeddings)
        return torch.randint(min(3, count - 1), count, (2, _LENGTH), generator=generator).to(device)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    main = getattr(model, "main_input_name", "input_ids")
    call: dict[str, Any] = {}
    if not cached and model.can_generate():
        call["use_cache"] = False
    if main == "input_features":
        call[main] = noise(1, config.num_mel_bins, 2 * config.max_source_positions)
    elif main == "pixel_values" or hasattr(config, "vision_config"):
        side = vision.image_size
        height, width = (side, side) if isinstance(side, int) else side
        call["pixel_values"] = noise(1, vision.num_channels, height, width)
    if main == "input_ids" or (hasattr(config, "text_config") and main != "pixel_values"):
        call["input_ids"] = ids()
    if getattr(config, "is_encoder_decoder", False):
        call["decoder_input_ids"] = ids()[: 1 if main == "input_features" else 2]
    return call


def text_call(model: Any, call: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """A call of a model whose ids are those of an English text, and what a certificate says of them.

    The text is a help topic of Python's; the tokenizer, that of the checkpoint in `folder`. Where it has none, ids are the
    first that the model has, in order.
    """
    ids = [name for name in ("input_ids", "decoder_input_ids") if name in call]
    if not ids:
        return call, "random values"
    text = model.config.get_text_config(decoder=True)
    count = getattr(text, "vocab_size", None) or model.get_input_embeddings().weight.shape[0]
    most = min(_TEXT, getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or _TEXT)
    found, told = _tokens(folder, most, count)
    return {**call, **dict.fromkeys(ids, torch.tensor([found]))}, told


def _tokens(folder: Path, most: int, count: int) -> tuple[list[int], str]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    order = list(range(min(most, count)))
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return order, "ids in order, for it has no tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = [token for token in tokenizer(topics["assert"])["input_ids"] if token < count][:most]
    except Exception as error:  # of whatever package the tokenizer needs; the certificate says so
        return order, f"ids in order, for its tokenizer does not load ({type(error).__name__})"
    return (found, "Python's help topic on assert") if found else (order, "ids in order, for its tokenizer gives none")
