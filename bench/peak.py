"""The peak of a run's memory, as the kernel counts pages: for every allocator in the process."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(run: Callable[[], Any]) -> int | None:
    """Bytes that a run, and its answer, hold at most, on top of what the process held before; None where Linux does not tell.

    The allocator's holes count: glibc keeps freed tensors of up to 32 MB for later ones, which may not fit into them. With
    MALLOC_MMAP_THRESHOLD_=65536 in the environment it does not, and is slower.

    Unused pages are given back first, and the process's high-water mark (VmHWM) is set to what it holds (VmRSS).
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")
        before = _held("VmRSS")
    except (OSError, AttributeError):  # another system, another C library
        return None
    answer = run()
    peak = _held("VmHWM") - before
    del answer
    return peak


def _held(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return 1024 * int(found[1])
