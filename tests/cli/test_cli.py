"""The commands, as a user types them: what they print and write, and their exit status."""

from __future__ import annotations

import os
import pickle
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import Ran, fastmorph, refuses
from torch import nn

import fastmorph as fm

pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
safetensors = pytest.importorskip("safetensors.torch", reason="the commands read and write safetensors")


def small_network() -> nn.Sequential:
    torch.manual_seed(3)  # other commands build it again
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(5, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.left(left) - self.right(right)


def wide_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 40))


def broken_network() -> nn.Module:
    raise RuntimeError("no network\ntoday")


def no_network() -> int:
    return 1


def exiting_network() -> nn.Module:
    raise SystemExit(0)


def stopped_network() -> nn.Module:
    raise KeyboardInterrupt


class ExitsWhenRun(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*small_network())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise SystemExit(0)


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
    refuses(fastmorph(*files.words(plan="plan\0.toml"), *shape), r"'plan\x00.toml' is not a path")
    refuses(fastmorph(*files.words(), "--inputs", ""), "--inputs: '' is not a path")
    refuses(fastmorph(*files.words(), "--input-shape", f"1,{10**20}"), "--input-shape 1,1", "GB in all; give smaller sizes")
    refuses(fastmorph(*files.words(), "--input-shape", "1," + "9" * 5000), "--input-shape")
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
        (f"{__name__}:exiting_network", "exiting_network failed with SystemExit: 0."),
        (f"{__name__}:stopped_network", "stopped_network failed with KeyboardInterrupt."),
        (f"{__name__}:ExitsWhenRun", "SystemExit: 0 ("),
        ("no\0module:x", "no"),
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


def test_morph_takes_plans_of_every_kind_and_replays_what_it_wrote(files: Files, tmp_path: Path) -> None:
    branches = fm.Stacked([fm.Sequential([(8, 5, "relu"), (6, 1, "relu"), (None, 1)]), fm.Sequential([(None, 1)])])
    block = fm.InsertSubnet("2", fm.Residual(4))
    fm.Plan([fm.GrowKernel("0", 5), fm.InsertSubnet("0", branches), block, fm.Deepen("2.layer")]).save(files.plan)
    shape = ("--input-shape", "1,2,4,4")
    ran = morph(files, tmp_path / "one", *shape, "--seed", 3)
    assert (ran.status, ran.err) == (0, "")
    words = shlex.split(ran.out.splitlines()[-1])
    assert fastmorph(*words[words.index("verify") :]).status == 0
    written = files._replace(plan=tmp_path / "one" / "plan.toml")
    assert fm.Plan.load(written.plan).inputs == (((1, 2, 4, 4), "float32"),)
    assert morph(written, tmp_path / "two").status == 0
    one, two = (safetensors.load_file(tmp_path / name / "child.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


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


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("kernel_size = nan", "kernel_size=nan must be an int"),
        ("kernel_size = 3.0", "kernel_size=3.0 must be an int"),
        ("kernel_size = [3.0, 3]", "is not a positive int"),
        ("kernel_size = [[3, 3], [5]]", "is not a positive int"),
        ("kernel_size = true", "True"),
        ("kernel_size = 'x'", "kernel_size='x' must be an int"),
        (f"kernel_size = {10**20}", "GB in all; give smaller sizes"),
        (f"kernel_size = [3, {10**20}]", "GB in all; give smaller sizes"),
        (f"kernel_size = {'9' * 5000}", "the plan is not valid TOML"),
        (f"kernel_size = {'[' * 100_000}", "its brackets are nested too deep"),
        ("kernel_size = {kind = 'skip'}", "must be an int"),
        ("kernel_size = 3\0", "the plan is not valid TOML"),
        ("kernel_size = '\0'", "the plan is not valid TOML"),
        ("kernel_size = 5\noperator = 5", "the plan is not valid TOML"),
    ],
)
def test_sizes_that_are_none_are_told_in_a_sentence(files: Files, tmp_path: Path, field: str, words: str) -> None:
    files.plan.write_text(f'[[morph]]\noperator = "grow_kernel"\nlayer = "0"\n{field}\n')
    refuses(morph(files, tmp_path / "out"), words)
    files.plan.write_text(
        f'[[morph]]\noperator = "insert_subnet"\nlayer = "0"\n[morph.subnet]\nkind = "residual"\nhidden_channels = 4\n{field}\n'
    )
    refuses(morph(files, tmp_path / "out"))
    files.plan.write_text(f'[[morph]]\noperator = "deepen"\nlayer = "0"\n{field.replace("size", "sizes")}\n')
    refuses(morph(files, tmp_path / "out"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("layer = 3", "takes the name of a layer, not a int"),
        ('layer = "\\u0000"', r"no layer '\x00'"),
        ("layer = {}", "takes the name of a layer, not a LayerSpec"),
        ('layer = "0"\nhidden_channels = nan', "nan hidden channels must be a positive int"),
        (f'layer = "0"\nhidden_channels = {10**20}', "GB in all"),
        ('layer = "0"\nkernel_sizes = 3', "two entries, one per layer"),
        ('layer = "0"\nkernel_sizes = [[[3]], 3]', "is not a positive int"),
        ('layer = "0"\nactivation = 3', "3"),
        ('layer = "0"\nnorm = []', "norm=()"),
        (f'layer = "0"\n[[inputs]]\nshape = [{10**20}]\ndtype = "float32"', "GB in all"),
    ],
)
def test_arguments_that_are_none_are_told_in_a_sentence(files: Files, tmp_path: Path, lines: str, words: str) -> None:
    files.plan.write_text(f'[[morph]]\noperator = "deepen"\n{lines}\n')
    refuses(morph(files, tmp_path / "out"), words)


# --- morphs from outside ------------------------------------------------------------------------------------------------------

NEGATE = """
from dataclasses import dataclass
import fastmorph as fm

@dataclass(frozen=True)
class Negate:
    layer: str
    reader: str

    @property
    def target(self):
        return self.layer

    def apply(self, transaction):
        layer, reader = (transaction.find_layer(name).module for name in (self.layer, self.reader))
        for tensor in (layer.weight, layer.bias, reader.weight):
            transaction.replace(tensor, -tensor, linear=lambda m: -m, square=lambda m: m)

fm.register_operator(Negate, name="NAME")
"""


def test_morphs_are_imported_by_the_command_line(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_morphs.py").write_text(NEGATE.replace("NAME", "negate"))
    files.plan.write_text('[[morph]]\noperator = "negate"\nlayer = "0"\nreader = "2"\n')
    refuses(morph(files, tmp_path / "out"), "'negate' in the plan must be one of", "--import")
    (tmp_path / "exiting_morphs.py").write_text("raise SystemExit(3)")
    refuses(morph(files, tmp_path / "out", "--import", "exiting_morphs"), "--import exiting_morphs failed with SystemExit: 3.")
    refuses(
        morph(files, tmp_path / "out", "--import", "no.such.module"), "--import no.such.module failed with ModuleNotFoundError"
    )
    ran = morph(files, tmp_path / "out", "--import", "imported_morphs", "--import", "json", "--input-shape", "1,2,4,4")
    assert (ran.status, ran.err) == (1, ""), "a ReLU stands between: the certificate sees it"
    words = shlex.split(ran.out.splitlines()[-1])
    assert words[words.index("verify") :][1:5] == ["--import", "imported_morphs", "--import", "json"]
    assert fastmorph(*words[words.index("verify") :]).status == 1


def test_morphs_are_found_by_their_entry_points(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "installed_morphs.py").write_text(NEGATE.replace("NAME", "installed.negate"))
    info = tmp_path / "installed_morphs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-morphs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastmorph.morphs]\nnegate = installed_morphs\n")
    files.plan.write_text('[[morph]]\noperator = "installed.negate"\nlayer = "0"\nreader = "2"\n')
    assert morph(files, tmp_path / "out").status == 0
    (info / "entry_points.txt").write_text("[fastmorph.morphs]\nnegate = no_such_morphs\n")
    refuses(morph(files, tmp_path / "out"), "the entry point negate = no_such_morphs", "No module named")


def test_a_plan_imports_nothing(files: Files, tmp_path: Path) -> None:
    files.plan.write_text('import = ["os"]\n')
    refuses(morph(files, tmp_path / "out"), "[[morph]] tables only")


def test_residuals_that_are_estimates_say_so(files: Files, tmp_path: Path) -> None:
    assert "~" not in morph(files, tmp_path / "out").out
    torch.manual_seed(0)
    wide, plan = nn.Sequential(nn.Linear(40, 40)), tmp_path / "wide.toml"
    safetensors.save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    fm.Plan([fm.Deepen("0", 48)]).save(plan)
    words = ("--weights", tmp_path / "wide.safetensors", "--plan", plan, "--out", tmp_path / "out", "--quiet")
    ran = fastmorph("morph", "--model", f"{__name__}:wide_network", *words)
    assert ran.status == 0, ran.err
    assert re.search(r"^  0 .* ~\d\.\de-\d\d ", ran.out, re.MULTILINE)
    assert "~: estimated from random sums of channels" in ran.out


def test_tied_weights_are_stored_once_and_read_back(tmp_path: Path) -> None:
    from fastmorph.cli.networks import load_weights

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


def test_candidates_lists_what_can_grow():
    ran = fastmorph("candidates", "--model", "test_cli:small_network", "--input-shape", "1,2,5,5", "--quiet")
    assert ran.status == 0
    assert str(fm.candidates(small_network(), torch.randn(1, 2, 5, 5))) == ran.out.strip()


def test_version():
    ran = fastmorph("--version")
    assert (ran.status, ran.out) == (0, f"fastmorph {fm.__version__}\n")
