"""The residual stream of a Llama at another width, beside cloning the child: 303 million weights become 416 million."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

import fastmorph as fm
from bench.conftest import Race
from bench.floors import Job
from bench.networks.exact import TOLERANCE
from bench.race import Contender
from bench.zoo.models import declare_torchvision_operators

FILLS = ("zero", "rotate")
WIDTH = 1408  # of 1024


@lru_cache(maxsize=1)
def parent() -> tuple[nn.Module, dict[str, Any]]:
    declare_torchvision_operators()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=16000)
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(16).view(2, 8), "use_cache": False}


def grown(fill: str) -> nn.Module:
    model, call = parent()
    plan = fm.Widen("model.embed_tokens", WIDTH, fill)
    return fm.morph(model, plan, example_inputs=call, verify=False, generator=0).model


def difference(child: nn.Module) -> float:
    """Of the logits, over the largest."""
    model, call = parent()
    assert child.get_submodule("model.embed_tokens").weight.shape[1] == WIDTH
    with torch.no_grad():
        before, after = (each(**call).logits for each in (model, child))
    return float((after - before).abs().max() / before.abs().max())


def contender(way: str) -> Contender:
    model, call = parent()
    shapes = fm.restructure(model, fm.Widen("model.embed_tokens", WIDTH, FILLS[0]), example_inputs=call)
    read, written = (sum(tensor.nbytes for tensor in each.parameters()) for each in (model, shapes))
    child = grown(FILLS[0]) if way == "clone" else None
    job = Job(f"303 to {written // 4e6:.0f} million weights", moved=written + (written if way == "clone" else read))
    run = (lambda: copy.deepcopy(child)) if way == "clone" else (lambda: grown(way))
    return Contender(run, difference, TOLERANCE, rounds=1, job=job, once=True)


@pytest.mark.contenders(LLAMA := [f"Llama {way}" for way in ("clone", *FILLS)], slow=LLAMA)
def test_streams(race: Race, name: str) -> None:
    race("networks", contender(name.removeprefix("Llama ")))
