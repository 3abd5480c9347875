"""A small call of a model of transformers, to follow it and to compare it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 8  # of sequences of ids


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
