"""The site: every snippet of Python runs, what is shown is what is printed, and all that is public is on the API page."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PACKAGES = {"training.md": "pytorch_lightning", "checkpoints.md": "safetensors"}


def words(text: str) -> list[str]:
    """Lines without their figures, which differ from one processor to the next."""
    return [re.sub(r"[-+]?\d[\d.e+-]*", "#", line).rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_a_page_s_snippets_run_and_print_what_is_shown(page, capsys, monkeypatch, tmp_path):
    text = page.read_text(encoding="utf-8")
    if page.name in PACKAGES:
        declare_torchvision_operators()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(PACKAGES[page.name], reason="a package of the page's is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for code, shown in re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", text, re.DOTALL):
        exec(code, namespace)
        printed = capsys.readouterr().out
        if shown:
            assert words(printed) == words(shown)


def test_the_api_page_has_all_that_is_public():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: fastmorph\.(?:graph\.structure\.)?(\w+)$", page, re.MULTILINE))
    hidden = {"graph", "nn"} | {"Candidate", "Candidates", "Coupled", "Structure", "Operator", "Options", "Transaction", "Step"}
    hidden |= {"Chain", "Sum"}
    assert set(fm.__all__) - named - hidden == set()
    assert named <= set(fm.__all__) | {"nn"}


def test_every_page_is_in_the_menu_and_every_picture_is_drawn():
    menu = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    drawn = (DOCS / "pictures.py").read_text(encoding="utf-8")
    for page in PAGES:
        assert f": {page.relative_to(DOCS)}\n" in menu
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(encoding="utf-8")):
            assert f"def {Path(picture).stem}():" in drawn


def test_the_sentences_on_the_page_of_errors_are_those_of_the_library():
    files = (DOCS.parent / "fastmorph").rglob("*.py")
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))
    rows = re.findall(r"^\| `(.*?)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    pieces = [piece.strip() for row in rows for piece in re.split(r"\.\.\.|\d+|'\w'", row) if len(piece.strip()) > 9]
    assert len(pieces) > len(rows)
    assert not [piece for piece in pieces if piece not in source]
