"""What is compiled ahead of time: every module here that exports `cases(target) -> Iterator[Case]`, one for each kernel."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator

from bench.cases.case import Case


def all_cases(target: str, files: Collection[str] = ()) -> Iterator[Case]:
    """Every case for one target of `bench.cases.case.TARGETS`, or those of the modules named in `files` alone."""
    for found in pkgutil.iter_modules(__path__):
        if not files or found.name in files:
            module = importlib.import_module(f"{__name__}.{found.name}")
            if hasattr(module, "cases"):
                yield from module.cases(target)
