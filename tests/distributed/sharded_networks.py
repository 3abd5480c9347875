"""Small networks, and the ways to shard them: a Llama-like one, and a ResNet-like one with sizes that no rank count divides."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastmorph as fm

HEAD = 4


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(width, heads * HEAD, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * HEAD, width, bias=False)

    def forward(self, x):
        parts = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.queries, self.keys, self.values))
        found = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(found.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.feed = Attention(width, heads), Feed(width, hidden)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, width=16, heads=4, hidden=24, blocks=2):
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 16, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.blocks = nn.ModuleList(Residual(7) for _ in range(2))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def llama():
    torch.manual_seed(0)
    return Llama().double()


def resnet():
    torch.manual_seed(0)
    return ResNet().double()


def batch(network):
    """Inputs and targets, the same on every rank: what all gradients average to is what one process has."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(network, Llama) or network is llama:
        tokens = torch.randint(16, (4, 8), generator=generator)
        return tokens, tokens.roll(1, 1)
    images = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (6,), generator=generator)


PLANS = {
    "llama": [
        fm.Widen("blocks.*.feed.up", 34),  # wider
        fm.AddHeads("blocks.0.attention", 6),
        fm.Widen("blocks.1.feed.up", 38, fill="duplicate"),  # what was grown grows again
        fm.Deepen("head", hidden_channels=40, activation="gelu"),  # deeper
    ],
    "mixture": [fm.InsertBlock("blocks.0"), fm.AddExperts("blocks.2.feed", 3), fm.Widen("blocks.1.feed.up", 32)],
    "resnet": [
        fm.Widen("blocks.0.conv1", 11),
        fm.GrowKernel("blocks.1.conv1", 5),
        fm.Deepen("blocks.0.conv2", activation="relu"),
        fm.Deepen("blocks.1.conv2", activation="relu"),
        fm.InsertSubnet("stem", fm.Sequential([(16, 3, "relu"), (20, 1, None), (None, 1)])),
        fm.Deepen("head", hidden_channels=16, activation="tanh"),
    ],
}
NETWORKS = {"llama": llama, "mixture": llama, "resnet": resnet}


# --- ways to shard -----------------------------------------------------------------------------------------------------------


def fsdp(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def tensor_parallel(model, mesh=None):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if mesh is None else mesh
    for block in model.blocks:
        plan = {f"attention.{name}": ColwiseParallel() for name in ("queries", "keys", "values")}
        plan |= {"attention.out": RowwiseParallel(), "feed.down": RowwiseParallel()}
        plan |= {"feed.gate": ColwiseParallel(), "feed.up": ColwiseParallel()}
        parallelize_module(block, mesh, plan)


def both(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def ddp(model):
    return DistributedDataParallel(model)


def nothing(model):
    return None


WAYS = {"fsdp": fsdp, "tensor": tensor_parallel, "both": both, "ddp": ddp, "nothing": nothing}
