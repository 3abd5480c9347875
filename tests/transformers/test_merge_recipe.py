"""Checkpoints grown by the commands on the page merge as their parents do: the tensors' means compute what theirs do."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from test_grow import call_of, made

from fastmorph.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "libraries.md"


def mean(first, second):
    assert first.keys() == second.keys()
    return {name: (tensor + second[name]) / 2 for name, tensor in first.items()}  # mergekit's `linear`, weights 0.5


def test_the_recipe_on_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chat, code = made("llama"), made("llama")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in code.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # fine-tuned apart
    chat.save_pretrained("chat")
    code.save_pretrained("code")
    commands = re.findall(r"^fastmorph (grow (?:chat|code) .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(command.split()) == 0
    merged = mean(*(load_file(Path(f"larger-{name}") / "model.safetensors") for name in ("chat", "code")))
    child = type(chat).from_pretrained("larger-chat").eval()
    child.load_state_dict(merged, strict=False)
    chat.load_state_dict(mean(chat.state_dict(), code.state_dict()))
    assert child.config.hidden_size == 48
    inputs = call_of("llama")
    with torch.no_grad():
        assert torch.allclose(child(**inputs).logits, chat(**inputs).logits, rtol=0, atol=1e-4)
