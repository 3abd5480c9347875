"""Commands run in this process."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from fastmorph.cli.main import main

FILES = ("parent.safetensors", "child.safetensors", "plan.toml", "certificate.json", "morph.png")


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
    assert not re.search(r"\.py, line \d+\)", ran.err) or "SystemExit" in ran.err, "an error that nobody foresaw"
    for text in expected:
        assert text in ran.err
