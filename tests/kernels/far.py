"""Run operators' kernels on tensors whose offsets pass 2^31, and compare with the same numbers side by side.

    python far.py compose "direct, shared pairs"

A program of its own, because a wrong offset is a crash. The memory is there as far as it is touched: a few pages of each
tensor. Operators are launched without what validates their arguments, which would touch all of it.
"""

from __future__ import annotations

import mmap
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from fastmorph_kernels import noise
from fastmorph_kernels.fill.kernel import config_for, launch_fill
from fastmorph_kernels.fill.table import DRAWN, OLD, Dimension, flat, table_of
from fastmorph_kernels.register import OPERATORS
from kernel_arguments import ARGUMENTS, outputs

_FAR = 2**31
_MAP_NORESERVE = 0x4000  # Linux: no promise of memory that is never touched
_MEMORY = 2**20  # kilobytes that all of this may hold at once
# Outputs that launchers take in one piece: a small one, and matrices but for the distance of their rows.
_WHOLE = {
    ("residual", 1): (),
    ("anderson_gram", 0): (),
    ("row_gram", 0): (0, 1),
    ("column_gram", 0): (0, 1),
    ("fill", 0): (),
    ("fill", 1): (),
    ("direct_many", 4): (),
    ("direct_many", 5): (),
}


def untouched(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which no page is there before it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def far(tensor: torch.Tensor, dim: int, steps: int) -> torch.Tensor:
    """A copy in which so many steps along one dimension come to just more than 2^31 elements."""
    strides = list(tensor.contiguous().stride())
    strides[dim] = _FAR // steps + 1
    span = sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    return untouched(span + 1, tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def placements(tensor: torch.Tensor, dims: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor with its last channel beyond 2^31, or with the tap after its last: what a window reaches."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            yield f"dimension {dim}", far(tensor, dim, tensor.shape[dim] - (dim < 3))


def launched(name: str, arguments: Sequence[Any], out: Any = None) -> list[torch.Tensor]:
    operator = OPERATORS[name.partition(",")[0]]
    out = operator.allocate(*arguments) if out is None else out
    operator.launch(out, *arguments)
    return outputs(out)


def compare(label: str, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Sums of at most 64 terms, which another layout may add up in another order."""
    for one, other in ((a.double(), b.double()) for a, b in zip(found, expected, strict=True)):
        atol = 64 * torch.finfo(torch.float32).eps * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, label=label: f"{label}: {text}")


def check(name: str) -> None:
    arguments = ARGUMENTS[name]()
    expected = launched(name, arguments)
    for place, given in enumerate(arguments):
        tensors = given if isinstance(given, list) else [given]
        for at, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            for where, moved in placements(tensor, range(tensor.ndim)):
                label = f"{name}, argument {place}.{at}, {where}"
                print(label, flush=True)
                changed = [*tensors[:at], moved, *tensors[at + 1 :]] if isinstance(given, list) else moved
                compare(label, expected, launched(name, [*arguments[:place], changed, *arguments[place + 1 :]]))
    for at, tensor in enumerate(expected):
        whole = _WHOLE.get((name.partition(",")[0], at), range(tensor.ndim))
        for where, moved in placements(torch.zeros_like(tensor), whole):
            label = f"{name}, output {at}, {where}"
            print(label, flush=True)
            out = [moved if k == at else torch.zeros_like(one) for k, one in enumerate(expected)]
            compare(label, expected, launched(name, arguments, out[0] if len(out) == 1 else out))


def check_fill_far_behind() -> None:
    """Two tiles at the end of 2^34 entries of noise: the table says that all other tiles lie before the first program."""
    print("fill, far behind", flush=True)
    rows, columns = 2**20, 2**14
    source, out = torch.zeros(1, columns), untouched((rows + 1) * columns, torch.float32).view(rows + 1, columns)
    kind, place = np.append(OLD, np.full(rows, DRAWN)), np.append(0, np.arange(rows))
    config = config_for(out)
    table = table_of([source], [out], *flat([(0, [Dimension(0, kind, place, place, rows, 7, 0.5)])]), config.block)
    assert table.wide
    table.numbers[2] = 2 - table.tiles
    launch_fill(out, table._replace(tiles=2), config)
    wanted = torch.empty(2 * config.block)
    noise.fill(wanted, 7, rows * columns - len(wanted), 0.5)
    assert torch.equal(out[-1, -len(wanted) :], wanted)
    assert not out[-1, : -len(wanted)].any()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        check(name)
        if name == "fill":
            check_fill_far_behind()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < _MEMORY
    print("done")
