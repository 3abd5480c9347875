"""Write the kernels as a source package for the Hub, checked: python kernels/hub out/hub.

    build.toml, flake.nix, CARD.md, tests/    from this folder
    torch-ext/fastmorph_kernels/              the kernels, without the file that the Hub's builder generates
    build/torch-<backend>/                    what loads here (kernels.get_local_kernel); the Hub's kernel-builder makes its own

The layout is that of huggingface/kernels, "Writing kernels" and "Kernel requirements". Beside itself and Python's own library
a kernel may import torch and triton, and these import numpy too; it registers operators under the prefix that
`_ops.add_op_namespace_prefix` gives.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "fastmorph_kernels"
ALLOWED = {"torch", "triton", "numpy"} | sys.stdlib_module_names
GENERATED = "_ops.py"
NAMESPACE = """import torch

ops = torch.ops.{0}


def add_op_namespace_prefix(name):
    return f"{0}::{{name}}"
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python kernels/hub", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder that is empty or not there yet")
    out = parser.parse_args().out
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty")
    problems = write(out)
    if problems:
        parser.exit(1, "".join(f"{problem}\n" for problem in problems))


def write(out: Path) -> list[str]:
    """Write the package to `out`; what is wrong with it, in sentences."""
    shutil.copytree(HERE, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__main__.py", "__pycache__"))
    settings = tomllib.loads((out / "build.toml").read_text(encoding="utf-8"))
    name = settings["general"]["name"].replace("-", "_")
    suffixes = tuple(f".{suffix}" for suffix in settings["torch-noarch"]["pyext"])
    extension = out / "torch-ext" / name
    for path in sorted(SOURCE.rglob("*")):
        if path.suffix in suffixes and path != SOURCE / GENERATED:
            target = extension / path.relative_to(SOURCE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    unique = hashlib.sha256("".join(digests(extension).values()).encode()).hexdigest()[:7]
    for backend in settings["general"]["backends"]:
        variant(out / "build" / f"torch-{backend}", extension, settings["general"], f"_{name}_{backend}_{unique}", backend)
    return problems(extension)


def variant(folder: Path, extension: Path, general: dict[str, object], identifier: str, backend: str) -> None:
    """What `kernels` loads on one backend: the files, their namespace, and what is known of them."""
    shutil.copytree(extension, folder)
    (folder / GENERATED).write_text(NAMESPACE.format(identifier), encoding="utf-8")
    metadata = {
        "id": identifier,
        **{key: general[key] for key in ("name", "version", "license")},
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file, in base64."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def problems(extension: Path) -> list[str]:
    """What the Hub would refuse, or what would break there."""
    found = []
    if not (extension / "__init__.py").is_file():
        found.append(f"{extension.name}/__init__.py is missing.")
    if (extension / extension.name).exists():
        found.append(f"{extension.name}/{extension.name} may not be there: the Hub writes it.")
    for path in sorted(extension.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(extension)}:{getattr(node, 'lineno', 0)}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [
                f"{place} imports {each}: import the package's own files relatively."
                for each in names
                if each.split(".")[0] not in ALLOWED
            ]
            if isinstance(node, ast.Call) and _registers(node.func) and not _prefixed(node.args[:1]):
                found.append(f"{place} registers an operator by a name of its own: take add_op_namespace_prefix(name).")
    return found


def _registers(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and ast.unparse(function) in {
        f"torch.library.{name}"
        for name in ("custom_op", "triton_op", "define", "impl", "register_fake", "register_kernel", "Library")
    }


def _prefixed(arguments: list[ast.expr]) -> bool:
    return (
        bool(arguments) and isinstance(arguments[0], ast.Call) and ast.unparse(arguments[0].func) == "add_op_namespace_prefix"
    )


if __name__ == "__main__":
    main()
