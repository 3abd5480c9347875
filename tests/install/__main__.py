"""Build the wheel and the source distribution, install each in an empty environment, and see that it works there.

    python -m tests.install --torch 2.11.* --also numpy==2.0.* --python python3.11 --tests tests/plan tests/checkpoint

It needs a Python with pip, and nothing else; the environment is made in a temporary folder, and goes with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOR_TESTS = ("pytest", "hypothesis", "safetensors")
# Tests use the checkout's bench/; what is installed comes before it on the path.
BEHIND = """
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "checkout.pth").write_text(sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.install", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter to make the environment with (default: this one)"
    )
    parser.add_argument("--torch", default="", help="its version, as pip takes it behind == (default: the newest)")
    parser.add_argument("--also", nargs="*", default=[], help="requirements to install besides, such as numpy==2.0.*")
    parser.add_argument(
        "--tests", nargs="*", default=[], help="tests to run on the installed wheel, besides the few steps of all"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Environment(Path(folder) / "env", options.python)
        run.pip(f"torch=={options.torch}" if options.torch else "torch", "hatchling", *options.also)
        run("-m", "hatchling", "build", "-d", folder, cwd=ROOT)
        (source,), (wheel,) = Path(folder).glob("*.tar.gz"), Path(folder).glob("*.whl")
        for distribution in (source, wheel):  # the wheel last: it is what the tests run on
            run.pip("--force-reinstall", "--no-deps", "--no-build-isolation", str(distribution))
            run.pip(str(distribution))  # its dependencies
            run("-I", "-W", "error", str(ROOT / "tests" / "install" / "smoke.py"), cwd=Path(folder))
        if options.tests:
            run.pip(*FOR_TESTS, *options.also)
            run("-c", BEHIND, str(ROOT))
            run("-P", "-m", "pytest", *options.tests, cwd=ROOT)


class Environment:
    """A new virtual environment, called with what its interpreter is to run."""

    def __init__(self, folder: Path, interpreter: str) -> None:
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
        self.python = str(
            next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())
        )

    def __call__(self, *arguments: str, cwd: Path | None = None) -> None:
        subprocess.run([self.python, *arguments], check=True, cwd=cwd)

    def pip(self, *arguments: str) -> None:
        self("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


if __name__ == "__main__":
    main()
