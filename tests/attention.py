"""Small networks with attention, written in several ways, and their trained look."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from widening import trained

from bench.zoo.models import declare_torchvision_operators, missing


def rotary(x):
    """Rotary positions for (B, H, T, D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3 ** torch.arange(half, dtype=x.dtype)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


class Attention(nn.Module):
    """Grouped queries, heads of their own size, norms over a head, rotary positions, biases."""

    def __init__(self, width=12, heads=4, groups=2, size=6, *, norms=True):
        super().__init__()
        self.n_heads, self.n_groups, self.head_dim, self.n_rep = heads, groups, size, heads // groups
        self.q, self.k, self.v = (
            nn.Linear(width, heads * size),
            nn.Linear(width, groups * size),
            nn.Linear(width, groups * size),
        )
        self.out = nn.Linear(heads * size, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=1e-6), nn.RMSNorm(size, eps=1e-6)) if norms else (nn.Identity(),) * 2

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q_norm(self.q(x).view(batch, length, self.n_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(batch, length, self.n_groups, self.head_dim)).transpose(1, 2)
        v = self.v(x).view(batch, length, self.n_groups, self.head_dim).transpose(1, 2)
        k, v = (t[:, :, None].expand(-1, -1, self.n_rep, -1, -1).flatten(1, 2) for t in (rotary(k), v))
        scores = rotary(q) @ k.transpose(-1, -2) * self.head_dim**-0.5
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, -1e9).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class Fused(nn.Module):
    """Queries, keys and values from one weight, arranged as (3, heads, size) or, head by head, as (heads, 3 * size)."""

    def __init__(self, width=12, heads=4, size=6, *, by_head=False):
        super().__init__()
        self.num_heads, self.size, self.by_head = heads, size, by_head
        self.qkv, self.proj = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)
        self.slopes = nn.Parameter(torch.rand(heads))

    def forward(self, x):
        batch, length, _ = x.shape
        if self.by_head:
            q, k, v = self.qkv(x).view(batch, length, self.num_heads, 3 * self.size).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.size).permute(2, 0, 3, 1, 4)
        far = torch.arange(length)[:, None] - torch.arange(length)
        scores = q @ k.transpose(-1, -2) / self.size**0.5 - self.slopes[:, None, None] * far.abs()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    """A pre-norm network of two blocks of attention between a stem and a head."""

    def __init__(self, *attention, width=12):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(attention)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in attention)

    def forward(self, x):
        x = self.stem(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


def grouped(**sizes):
    """Two blocks of `Attention`."""
    return trained(Blocks(Attention(**sizes), Attention(**sizes)))


def fused(**sizes):
    """Two blocks of `Fused`."""
    return trained(Blocks(Fused(**sizes), Fused(**sizes)))


def package(name: str) -> Any:
    """transformers or timm, where it is installed; skips the test without."""
    if missing(name):
        pytest.skip(f"{name} is not installed (requirements-zoo.txt)")
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
