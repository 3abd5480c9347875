"""The architectures of the zoo: packages of model code, random weights made to look trained."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIST = Path(__file__).with_name("architectures.txt")
_SIDES = (64, 32, 96, 128, 160, 224, 256, 299)


def architectures() -> list[str]:
    """Names as "zoo/model", one for each network in the list."""
    return [line.strip() for line in LIST.read_text().splitlines() if line.strip() and not line.startswith("#")]


def missing(zoo: str) -> str | None:
    """The package that a zoo needs and this machine lacks."""
    needed = {"torchvision": ["torchvision"], "timm": ["timm"], "pytorchcv": ["pytorchcv"], "transformers": ["transformers"]}
    return next((name for name in needed[zoo] if importlib.util.find_spec(name) is None), None)


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in eval mode and float64, and inputs of the smallest size that it runs on.

    Raises RuntimeError for one that runs on none.
    """
    torch.manual_seed(seed)
    zoo, _, model_name = name.partition("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, candidates = _MAKERS[zoo](model_name)
        model = model.double()
        tried = []
        for inputs in candidates:
            try:
                _look_trained(model, inputs)
                with torch.no_grad():
                    model.eval()(*inputs)
                return model, inputs
            except (RuntimeError, ValueError, AssertionError, IndexError) as error:  # a size that the network does not take
                tried.append(f"{tuple(inputs[0].shape)}: {error}")
    raise RuntimeError(f"{name} runs on none of its inputs: {'; '.join(tried)}")


def _look_trained(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """BatchNorm statistics of real activations, and no vectors of zeros, ones or tiny values, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                level = float(parameter.flatten()[0].abs())
                low, high = (0.5, 1.5) if level >= 0.5 else (-0.1, 0.1) if level == 0 else (0.1, 0.5)
                parameter.copy_(low + (high - low) * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        kept = [norm.momentum for norm in norms]
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        model(*inputs)
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.running_var is not None:
                norm.running_var.add_(0.2 * norm.running_var.mean())  # few positions: some variances are near zero by chance
    model.eval()


def _images(batch: int = 2) -> Iterator[tuple[Tensor, ...]]:
    for side in _SIDES:
        yield (torch.randn(batch, 3, side, side, dtype=torch.float64),)


@cache
def declare_torchvision_operators() -> torch.library.Library:
    """torchvision's wheels are built for CUDA, and cannot be imported beside a CPU build of torch before these are declared."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _torchvision(name: str) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    declare_torchvision_operators()
    import torchvision

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **extra), _images()


def _timm(name: str) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    declare_torchvision_operators()
    import timm

    return timm.create_model(name, pretrained=False), _images()


def _pytorchcv(name: str) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    declare_torchvision_operators()
    from pytorchcv.model_provider import get_model

    return get_model(name, pretrained=False), _images()


class _Bare(nn.Module):
    """A transformers model that returns its tensors and not a mapping."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs, return_dict=False)[0]


def _transformers(name: str) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    declare_torchvision_operators()
    import transformers

    kind, sizes = _TINY[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(config)
    if "vocab_size" in sizes:
        return _Bare(model), iter([(torch.randint(1, 99, (2, 12)),)])
    return _Bare(model), _images()


_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _TEXT),
    "roberta": ("Roberta", _TEXT),
    "electra": ("Electra", {**_TEXT, "embedding_size": 24}),
    "albert": ("Albert", {**_TEXT, "embedding_size": 24}),
    "mpnet": ("MPNet", _TEXT),
    "distilbert": ("DistilBert", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "opt": ("OPT", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}),
    "llama": ("Llama", {**_TEXT, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {**_TEXT, "num_key_value_heads": 2}),
    "resnet": ("ResNet", {"embedding_size": 16, "hidden_sizes": [16, 32, 48], "depths": [1, 1, 1]}),
    "convnext": ("ConvNext", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}),
    "mobilenetv2": ("MobileNetV2", {"depth_multiplier": 0.35}),
    "regnet": ("RegNet", {"embedding_size": 16, "hidden_sizes": [16, 32, 48], "depths": [1, 1, 1], "groups_width": 8}),
    "vit": ("ViT", {**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, "image_size": 64, "patch_size": 16}),
    "poolformer": ("PoolFormer", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}),
    "segformer": ("Segformer", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]}),
}
_MAKERS: dict[str, Callable[[str], tuple[nn.Module, Iterator[tuple[Tensor, ...]]]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "pytorchcv": _pytorchcv,
    "transformers": _transformers,
}
