"""The kernels as a package for the Hub: its layout, and that it loads there and passes its own tests, without fastmorph."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUB = ROOT / "kernels" / "hub"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "package"
    subprocess.run([sys.executable, str(HUB), str(out)], check=True)
    return out


def test_it_has_every_file_of_the_kernels_and_a_namespace_of_its_own(package):
    written = {path.relative_to(package / "torch-ext") for path in (package / "torch-ext").rglob("*.*")}
    source = ROOT / "kernels"
    kernels = {
        path.relative_to(source) for path in (source / "fastmorph_kernels").rglob("*") if path.suffix in (".py", ".json")
    }
    assert written == kernels - {Path("fastmorph_kernels/_ops.py")}
    for backend in ("cpu", "cuda"):
        assert (package / "build" / f"torch-{backend}" / "metadata.json").is_file()


def test_what_the_hub_refuses_is_named(tmp_path):
    extension = tmp_path / "own"
    (extension / "own").mkdir(parents=True)
    lines = [
        "import own.part",
        "import torch",
        '@torch.library.custom_op("own::f", mutates_args=())',
        "def f() -> None: ...",
        "",
    ]
    (extension / "op.py").write_text("\n".join(lines))
    found = "\n".join(runpy.run_path(str(HUB / "__main__.py"))["problems"](extension))
    for part in ("own/__init__.py is missing", "own/own may not be there", "op.py:1 imports own.part", "op.py:3 registers"):
        assert part in found


def test_it_loads_by_the_kernels_library_and_passes_its_own_tests(package):
    pytest.importorskip("kernels.load", reason="kernels is not installed (requirements-others.txt)")
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert {str(backend) for backend in Build.open(package).general.backends} == {"cpu", "cuda"}
    variant = package / "build" / "torch-cpu"
    Metadata.read_from_file(variant / "metadata.json").digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    path = [
        folder
        for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if folder and ROOT not in (Path(folder), *Path(folder).parents)
    ]
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(package / "tests")]
    ran = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
