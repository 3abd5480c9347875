"""Attention that PyTorch runs as one operator is followed as what it stands for, written out in products and a softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from widening import randn, trained

import fastmorph as fm
from fastmorph.graph import attention, follow, rules

HEADS, SIZE, LENGTH = 4, 8, 6


def written_out(q, k, v, mask, causal):
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    scores = q @ k.transpose(-2, -1) * SIZE**-0.5
    if causal:
        scores = scores + torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1) @ v


def in_one(q, k, v, mask, causal):
    return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    def __init__(self, attend, shared, mask, causal, learned):
        super().__init__()
        self.attend, self.causal = attend, causal
        self.query, self.out = nn.Linear(5, HEADS * SIZE), nn.Linear(HEADS * SIZE, 5)
        self.key, self.value = (nn.Linear(5, HEADS // shared * SIZE) for _ in range(2))
        self.register_buffer("mask", torch.randn(1, HEADS, LENGTH, LENGTH) if mask else None)
        self.learned = nn.Parameter(torch.randn(1, HEADS, LENGTH, SIZE)) if learned else None

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.learned is not None:
            q = self.learned.expand(len(x), -1, -1, -1)
        return self.out(self.attend(q, k, v, self.mask, self.causal).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("shared", "mask", "causal", "learned"),
    [
        *((1, False, False, False), (2, False, False, False), (4, False, True, False)),
        *((1, True, False, False), (2, True, False, False), (1, False, False, True)),
    ],
)
def test_it_is_followed_as_its_parts(shared, mask, causal, learned, monkeypatch):
    ran = []
    plain = rules._RULES["aten::_scaled_dot_product_flash_attention_for_cpu"]
    monkeypatch.setitem(
        rules._RULES, "aten::_scaled_dot_product_flash_attention_for_cpu", lambda *given: ran.append(1) or plain(*given)
    )
    rules.rule_of.cache_clear()
    given = shared, mask, causal, learned
    one, parts = (follow(trained(Attention(attend, *given)), randn(2, LENGTH, 5)) for attend in (in_one, written_out))
    rules.rule_of.cache_clear()
    assert ran, "PyTorch did not run it as one operator"
    count = sum(axis.size for axis in one.record.axes if axis.parameter)
    classes = [structure.coupling(frozenset()).classes[:count] for structure in (one, parts)]
    np.testing.assert_array_equal(*classes)
    fixed = [structure.coupling(frozenset()).fixed[:count] for structure in (one, parts)]
    np.testing.assert_array_equal(*fixed)
    for kind in ("reads", "writes", "shifts", "makes_of_zero", "bent"):
        np.testing.assert_array_equal(*(structure.record.mask(kind)[:count] for structure in (one, parts)))


def test_another_scale_is_noted():
    """It comes from the size of a head, which a growth may change."""
    model = trained(Attention(in_one, 1, False, False, False))
    (entry,) = (entry for entry in follow(model, randn(2, LENGTH, 5)).record.journal if "flash" in str(entry[1]))
    assert entry[2] == SIZE**-0.5


def test_heads_that_it_keeps_apart_are_added():
    model, x = trained(Attention(in_one, 1, False, False, False)), randn(2, LENGTH, 5)
    child = fm.widen(model, {"query": (HEADS + 2) * SIZE}, example_inputs=x, generator=0)
    assert child.key.out_features == child.out.in_features == (HEADS + 2) * SIZE
    torch.testing.assert_close(child(x), model(x), rtol=0, atol=1e-12)


def test_no_kernel_is_without_a_rule():
    names = [name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product")]
    fused = [name for name in names if not name.endswith("backward") and name != "_scaled_dot_product_attention_math"]
    assert attention.plain_kernels(torch.device("cuda")) is not None  # other devices run in parts
    assert {f"aten::{name}" for name in fused if "for_mps" not in name} <= set(rules._RULES)
