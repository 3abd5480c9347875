"""What has grown learns on: the loss falls from the parent's, and twins part."""

from __future__ import annotations

from typing import Any

import torch
from test_grow import transformers
from torch import Tensor, nn

import fastmorph as fm
from bench.learning.data import text

LENGTH, BATCH = 32, 16


def batches(part: Tensor, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(len(part) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([part[start : start + LENGTH] for start in at.tolist()])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: Tensor, seed: int, steps: int) -> None:
    model.train()
    for ids, _ in zip(batches(part, seed), range(steps), strict=False):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def loss(model: nn.Module, part: Tensor) -> float:
    with torch.no_grad():
        found = [float(model(input_ids=ids, labels=ids).loss) for ids, _ in zip(batches(part, 9), range(8), strict=False)]
    return sum(found) / len(found)


def twins(weight: Tensor) -> list[tuple[int, int]]:
    """Pairs of equal rows."""
    alike = (weight[:, None] == weight[None]).all(-1)
    return [(int(one), int(two)) for one, two in alike.nonzero() if one < two]


def test_a_grown_model_learns_on_and_its_twins_part():
    learned, asked, kinds = text()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8},
        **{"num_key_value_heads": 2, "vocab_size": kinds, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    parent = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(parent.parameters(), lr=3e-3)
    train(parent, optimizer, learned, 1, 60)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4}
    grown = fm.transformers.grow(parent, **sizes, num_hidden_layers=3, optimizer=optimizer, generator=0)
    child, born = grown.model, loss(parent, asked)
    assert abs(loss(child, asked) - born) < 1e-4

    blocks = child.model.layers
    inner = {f"{number} {part}": block.get_submodule(part) for number, block in enumerate(blocks) for part in ("mlp.up_proj",)}
    inner |= {
        f"{number} {part}": block.get_submodule(part) for number, block in enumerate(blocks) for part in ("self_attn.q_proj",)
    }
    at_birth = {name: twins(layer.weight.detach()) for name, layer in inner.items()}
    assert all(at_birth.values())  # new inner channels and heads of every block, and the new block's own
    assert max(len(at_birth[name]) for name in ("1 mlp.up_proj", "2 mlp.up_proj")) > len(at_birth["0 mlp.up_proj"])
    assert not child.model.embed_tokens.weight[:, 16:].any()

    assert grown.optimizer is not None
    train(child, grown.optimizer, learned, 2, 100)
    assert loss(child, asked) < born - 0.05
    for name, pairs in at_birth.items():
        assert not set(pairs) & set(twins(inner[name].weight.detach())), name
    assert child.model.embed_tokens.weight[:, 16:].any(0).all()
