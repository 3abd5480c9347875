"""The rooms of the house: who may import whom. Imports in functions and for types alone count as well."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base, package in ((ROOT, "fastmorph"), (ROOT / "kernels", "fastmorph_kernels"))
    for path in sorted((base / package).rglob("*.py"))
}
FLOORS = (
    ("errors",),
    ("context", "elsewhere", "inputs", "outputs", "ranks", "scratch"),
    ("nn", "equation", "graph", "certify"),
    ("plan",),
    ("morphs", "checkpoint", "distributed", "integrations"),
    ("transformers",),
    ("cli", "__main__"),
)


def imports(module: str) -> set[str]:
    """Every module that this one names in an import, wherever in the file it stands."""
    found = set()
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            inside = names & FILES.keys()
            found |= inside if len(inside) == len(names) else inside | {source}
            found |= {name for name in names if name == "torch.nn" or (source == "torch.nn" and name != "torch.nn.functional")}
    return found


def room(module: str) -> str:
    """The folder of fastmorph, or the file in it, that a module is in; "" for fastmorph itself and other packages."""
    return [*module.split("."), ""][1] if module.split(".")[0] == "fastmorph" else ""


def modules_of(*rooms: str) -> list[str]:
    return [module for module in FILES if room(module) in rooms]


IMPORTS = {module: imports(module) for module in FILES}


def test_there_is_no_circle():
    graph = {module: {name for name in names if name in FILES and name != module} for module, names in IMPORTS.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert len(order) == len(FILES)


def test_every_room_has_a_floor_and_imports_from_below_alone():
    floor = {name: height for height, rooms in enumerate(FLOORS) for name in rooms}
    assert {room(module) for module in FILES} - {""} == set(floor)
    up = [
        (module, name)
        for module in modules_of(*floor)
        for name in IMPORTS[module]
        if room(name) and room(name) != room(module) and floor[room(name)] > floor[room(module)]
    ]
    assert not up


def test_only_the_commands_import_the_whole_library():
    assert not [m for m in FILES if "fastmorph" in IMPORTS[m] and room(m) not in ("cli", "__main__", "")]


def modules_used(module: str) -> set[str]:
    """What of torch.nn a file names, functions apart: those know no modules."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    named = {f"{name}." for name in IMPORTS[module]} | {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return {name for name in named if name.startswith("torch.nn.") and not name.startswith("torch.nn.functional")}


def test_kernels_know_no_models():
    kernels = [module for module in FILES if module.split(".")[0] == "fastmorph_kernels"]
    assert kernels
    for module in kernels:
        assert not [name for name in IMPORTS[module] if name.split(".")[0] == "fastmorph"], module
        assert not modules_used(module), module


def test_the_equation_knows_no_modules():
    for module in modules_of("equation"):
        assert {room(name) for name in IMPORTS[module]} <= {"equation", "errors", "elsewhere", "ranks", ""}, module
        assert not modules_used(module), module


def test_the_graph_changes_no_weights():
    for module in modules_of("graph"):
        assert not {room(name) for name in IMPORTS[module]} & {"equation", "plan", "morphs", "cli"}, module
