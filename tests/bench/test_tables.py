"""The tables on the pages say what the ledger says."""

from __future__ import annotations

import pytest

from bench.tables import PAGES, filled


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_s_tables_are_those_of_the_ledger(path):
    page = path.read_text(encoding="utf-8")
    assert filled(page) == page, "write them anew: python -m bench.tables"
