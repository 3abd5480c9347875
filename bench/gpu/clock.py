"""Times: of the device alone, and of whole calls with everything that the host does for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.testing
from torch import Tensor

from bench.gpu.setup import Setup

_QUANTILES = [0.5, 0.2, 0.8]
_SHORT = 1e-4  # seconds
_MOST_SETS = 64
_ROUNDS = 9


class Times(NamedTuple):
    """Seconds: median, and where the fastest and slowest fifth begin."""

    median: float
    low: float
    high: float

    def over(self, parts: int) -> Times:
        return Times(*(t / parts for t in self))


def on_device(setup: Setup, run: Callable[..., Any], make: Callable[[int], tuple[Any, ...]], *, capture: bool = True) -> Times:
    """The device's time for `run(*make(seed))`, inputs not in cache.

    Short runs are timed many at a time, in one CUDA graph over sets of inputs that fill the cache twice; where they cannot be
    captured, host and launches are in the figure.
    """
    inputs = make(0)
    if setup.rehearsal:
        return once(setup, lambda: run(*inputs))
    found = _bench(lambda: run(*inputs))
    if found.median >= _SHORT or not capture:
        return found
    cache = torch.cuda.get_device_properties(setup.device).L2_cache_size
    size = sum(nbytes(x) for x in (*inputs, run(*inputs)))
    sets = [make(seed) for seed in range(min(_MOST_SETS, 2 + 2 * cache // max(1, size)))]

    def run_all() -> None:
        for one in sets:
            run(*one)

    graph, _ = captured(run_all)
    return _bench(graph.replay).over(len(sets))


def whole(setup: Setup, call: Callable[[], Any], rounds: int = _ROUNDS) -> Times:
    """The time of a whole call, host included, until the device has done its work; the first call is not timed."""
    if setup.rehearsal:
        return once(setup, call)
    call()
    seconds = torch.tensor([once(setup, call).median for _ in range(rounds)], dtype=torch.float64)
    return Times(*seconds.quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist())


def once(setup: Setup, call: Callable[[], Any]) -> Times:
    """The time of one whole call, of what has run before."""
    setup.wait()
    start = time.perf_counter()
    call()
    setup.wait()
    seconds = time.perf_counter() - start
    return Times(seconds, seconds, seconds)


def captured(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of a run, and the run's outputs, which a replay fills anew. What runs for the first time runs outside it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def nbytes(value: Any) -> int:
    """Bytes of the tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(nbytes, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0


def _bench(run: Callable[[], Any]) -> Times:
    """Triton's own clock, which empties the cache before each run."""
    found: Any = triton.testing.do_bench(run, quantiles=_QUANTILES)
    return Times(*(1e-3 * milliseconds for milliseconds in found))
