"""What would be published: the files in it, one version everywhere, and that it works when installed alone."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastmorph as fm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(out)], cwd=ROOT, check=True, capture_output=True)
    return {path.suffix: path for path in out.iterdir()}


def test_there_is_one_version():
    assert PROJECT["version"] == fm.__version__
    assert f"\nversion: {fm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {fm.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_wheel_has_the_library_and_works_alone(built, tmp_path):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fastmorph").rglob("*") if path.suffix in (".py", ".typed")}
    kernels = {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels" / "fastmorph_kernels").rglob("*.*")}
    kernels = {name for name in kernels if "__pycache__" not in name}
    assert sources | kernels <= names
    assert all(name.split("/")[0] in ("fastmorph", "fastmorph_kernels") or ".dist-info/" in name for name in names)
    (metadata,) = (tmp_path / name for name in names if name.endswith("METADATA"))
    assert set(re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata.read_text(), re.MULTILINE)) == set(PROJECT["dependencies"])
    code = "import fastmorph as fm, torch; from torch import nn; assert fm.__file__.startswith(PATH), fm.__file__; "
    code += "fm.deepen(nn.Sequential(nn.Conv2d(3, 4, 3)), '0', hidden_channels=20)"
    code = code.replace("PATH", repr(str(tmp_path)))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path)})


def test_the_source_distribution_builds_and_tests_itself(built):
    with tarfile.open(built[".gz"]) as sources:
        names = {name.split("/", 1)[1] for name in sources.getnames() if "/" in name}
    for needed in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "tests/conftest.py",
        "fastmorph/py.typed",
        "bench/zoo/models.py",
    ):
        assert needed in names, needed
