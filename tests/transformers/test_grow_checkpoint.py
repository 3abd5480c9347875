"""A checkpoint grown into a checkpoint: the bits that growth in memory gives, out of shards, and on after an interruption."""

from __future__ import annotations

import json
import shutil
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from test_grow import LLAMA, call_of, made, transformers

import fastmorph as fm
from fastmorph.cli.main import main
from fastmorph.elsewhere import Elsewhere
from fastmorph.morphs.stream_fill import StreamFilling
from fastmorph.transformers.example import text_call
from fastmorph.transformers.files import DiskShelf, header_of

SIZES = {"hidden_size": 24, "intermediate_size": 17, "num_hidden_layers": 3, "vocab_size": 45}


def grown(tmp_path: Any, name: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A parent, and its class's model of the grown checkpoint."""
    parent = made(name)
    parent.save_pretrained(tmp_path / "source", max_shard_size=4000)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    plan, certificate = fm.transformers.grow_checkpoint(tmp_path / "source", tmp_path / "out", SIZES, seed=5, **options)
    assert certificate or options.get("verify") is False
    assert fm.Plan.load(tmp_path / "out" / "growth.toml") == plan
    return parent, type(parent).from_pretrained(tmp_path / "out").eval()


@pytest.mark.parametrize(("name", "fill"), [("llama", None), ("llama", "rotate"), ("qwen3", None)])  # tied: the last
def test_the_bits_are_those_of_growth_in_memory(name, fill, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmorph.transformers.files._SMALL", 0)  # everything that is made goes through a file
    parent, child = grown(tmp_path, name, shard_size=5000, fill=fill)
    wanted = fm.transformers.grow(parent, **SIZES, generator=5, fill=fill).model
    assert child.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensor, wanted.state_dict()[key]) for key, tensor in child.state_dict().items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / ".growing").exists()
    ids = call_of(name)["input_ids"]
    with torch.no_grad():
        assert torch.allclose(child(ids).logits[..., :40], parent(ids).logits, rtol=0, atol=1e-4)


def test_tensors_that_files_call_otherwise_keep_these_names(tmp_path):
    parent = made("vit")
    parent.save_pretrained(tmp_path / "source")
    sizes = {"num_hidden_layers": 3, "intermediate_size": 16}
    _, certificate = fm.transformers.grow_checkpoint(tmp_path / "source", tmp_path / "out", sizes, seed=5)
    assert certificate
    assert "random values" in str(certificate)
    before, after = (header_of(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
    assert before.keys() < after.keys()
    assert not before.keys() - {"__metadata__"} <= parent.state_dict().keys()  # else this shows nothing
    child = type(parent).from_pretrained(tmp_path / "out").eval().state_dict()
    wanted = fm.transformers.grow(parent, **sizes, generator=5).model.state_dict()
    assert child.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in child.items())


def test_the_certificate_is_of_a_text_by_the_tokenizer_of_the_checkpoint(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz .:")}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="?"))
    made("llama").save_pretrained(tmp_path / "source")
    args = (tmp_path / "source", tmp_path / "out", {"num_hidden_layers": 3})
    assert "ids in order, for it has no tokenizer" in str(fm.transformers.grow_checkpoint(*args)[1])
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path / "source")
    assert "help topic" in str(fm.transformers.grow_checkpoint(*args)[1])
    found, _ = text_call(made("llama"), {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, tmp_path / "source")
    assert found["input_ids"][0].tolist() == [words.get(letter, 0) for letter in topics["assert"]][:64]
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    assert "tokenizer does not load" in str(fm.transformers.grow_checkpoint(*args)[1])


def test_each_tensor_is_made_when_it_is_written(tmp_path, monkeypatch):
    """What is made goes to its file alone: no scratch file is written, and none is made twice."""
    made_of: list[str] = []
    fill = StreamFilling.tensor
    monkeypatch.setattr(StreamFilling, "tensor", lambda self, name, old: made_of.append(name) or fill(self, name, old))
    monkeypatch.setattr(DiskShelf, "keep", lambda self, value: value if isinstance(value, Elsewhere) else pytest.fail("kept"))
    made("llama").save_pretrained(tmp_path / "source")
    sizes = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}  # a new block copies another
    fm.transformers.grow_checkpoint(tmp_path / "source", tmp_path / "out", sizes, verify=False)
    assert len(made_of) == len(set(made_of)) > 10


def test_an_interrupted_growth_goes_on(tmp_path):
    grown(tmp_path, shard_size=5000, verify=False)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    kept, lost = shards[0], shards[-1]
    bits, when = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.write_bytes(bits[:-7])
    again = {"seed": 5, "shard_size": 5000, "verify": False}
    fm.transformers.grow_checkpoint(tmp_path / "source", tmp_path / "out", SIZES, **again)
    assert lost.read_bytes() == bits
    assert kept.stat().st_mtime_ns == when
    fm.transformers.grow_checkpoint(tmp_path / "source", tmp_path / "out", SIZES, **again | {"seed": 6})
    assert kept.stat().st_mtime_ns != when


def test_the_command(tmp_path, capsys):
    made("llama").save_pretrained(tmp_path / "source")
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    assert main(["grow", source, out, "--intermediate-size", "15", "--num-hidden-layers", "3"]) == 0
    assert "HOLDS" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert main(["grow", source, out, "--intermediate-size", "5"]) == 2
    assert "never shrink" in capsys.readouterr().err


def test_refusals(tmp_path):
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(fm.MorphError, match="joins or cuts tensors"):
        fm.transformers.grow_checkpoint(tmp_path / "mixtral", tmp_path / "out", {"num_hidden_layers": 3})
    made("llama").save_pretrained(tmp_path / "source")
    with pytest.raises(fm.MorphError, match="directory of its own"):
        fm.transformers.grow_checkpoint(tmp_path / "source", tmp_path / "source", SIZES)
    shutil.move(tmp_path / "source" / "model.safetensors", tmp_path / "moved")
    with pytest.raises(fm.MorphError, match="in safetensors is needed"):
        fm.transformers.grow_checkpoint(tmp_path / "source", tmp_path / "out", SIZES)
