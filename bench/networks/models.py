"""The networks of the suite, of random weights, each with a small input and the plan that widens every block of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

import fastmorph as fm
from bench.floors import Job
from bench.zoo.models import declare_torchvision_operators

# What is widened in each: the first convolution of every block; of vgg16 all but the last one; a transformer's MLPs.
TORCHVISION: dict[str, Callable[[str, nn.Module], bool]] = {
    "resnet50": lambda name, _: name.startswith("layer") and name.endswith(".conv1"),
    "resnet152": lambda name, _: name.startswith("layer") and name.endswith(".conv1"),
    "wide_resnet50_2": lambda name, _: name.startswith("layer") and name.endswith(".conv1"),
    "densenet121": lambda name, _: ".denselayer" in name and name.endswith(".conv1"),
    "vgg16": lambda name, module: isinstance(module, nn.Conv2d) and name != "features.28",
}
NETWORKS = (*TORCHVISION, "transformer")
LAYERS, WIDTH, HIDDEN, HEADS = 24, 256, 1024, 8  # the transformer's


class Network:
    """A network with its input and its plan.

    Attributes:
        model: in eval mode.
        inputs: one argument, (1, 3, 64, 64), for a transformer (1, 16, WIDTH).
        plan: each of these layers gets a quarter more channels.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, layers: list[str]) -> None:
        self.model, self.inputs = model.eval(), inputs
        self.plan = [fm.Widen(layer, _width(model.get_submodule(layer)) * 5 // 4) for layer in layers]

    @property
    def shape(self) -> str:
        """In words."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{type(self.model).__name__} of {count / 1e6:.3g} million weights, input {tuple(self.inputs.shape)}"

    @property
    def rewriting(self) -> Job:
        """Reading every weight and writing it: less than any child needs."""
        return Job(self.shape, moved=2 * sum(parameter.nbytes for parameter in self.model.parameters()))

    @property
    def looking(self) -> Job:
        """Work on the structure alone, which needs no weight."""
        return Job(self.shape)


@lru_cache(maxsize=1)  # contenders of one network take turns; the others need not be held
def network(name: str) -> Network:
    """One of NETWORKS, a CIFAR ResNet by its depth ("resnet20"), or a stack ("stack64"), always the same."""
    torch.manual_seed(0)
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
        encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        return Network(encoder, torch.randn(1, 16, WIDTH), [f"layers.{number}.linear1" for number in range(LAYERS)])
    declare_torchvision_operators()
    import torchvision

    model = torchvision.models.get_model(name, weights=None)
    widened = [layer for layer, module in model.named_modules() if TORCHVISION[name](layer, module)]
    return Network(model, torch.randn(1, 3, 64, 64), widened)


@lru_cache(maxsize=1)
def cifar_resnet(depth: int) -> Network:
    """The ResNet of 6 n + 2 layers for CIFAR (He et al., 2016): three stages of n blocks, of 16, 32 and 64 channels."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    channels = 16
    for stage in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            blocks.append(_Block(channels, stage))
            channels = stage
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return Network(model, torch.randn(1, 3, 32, 32), [f"{len(stem) + n}.conv1" for n in range(len(blocks))])


@lru_cache(maxsize=1)
def stack(channels: int, depth: int, size: int) -> Network:
    """Convolutions with ReLU between them, and the plan that widens all but the last."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, size, padding="same"), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return Network(model, torch.randn(1, channels, 4, 4), [str(2 * number) for number in range(depth - 1)])


class _Block(nn.Module):
    """Two convolutions with norms, and a shortcut: a 1x1 convolution where channels or sizes change."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = out // channels
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _width(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
