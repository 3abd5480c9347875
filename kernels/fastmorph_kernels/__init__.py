"""Triton kernels for the morphism equation, as PyTorch operators; they know nothing of models.

An operator has a folder of its name: `kernel.py` the Triton kernels and their launchers, `op.py` the registered operator and
the validated function in front of it, `configs.json` its tile sizes. Beside the folders stands what operators share:

    register.py   makes a PyTorch operator of three functions: allocate, launch, plain
    support.py    dtypes, and where kernels run         checks.py   refusals
    configs.py    tables of tile sizes                  tiling.py   tiles of a product, on the host     tile.py   on the device
    noise.py      noise from a counter                  words.py    the same on the device
    groups.py     grouped launches, on the device

To add an operator touches four places: its folder, its line here, its tests in `tests/kernels/` (their table of arguments for
all operators, `kernel_arguments.py`, included), and its cases for the compiler in `bench/cases/`.
"""

from .anderson import anderson_gram, anderson_update
from .checks import Precision
from .column_gram import column_gram
from .compose import compose
from .correlate import correlate
from .direct import direct
from .direct_many import direct_many
from .fill import fill
from .residual import residual
from .row_gram import row_gram

__all__ = [
    "Precision",
    "anderson_gram",
    "anderson_update",
    "column_gram",
    "compose",
    "correlate",
    "direct",
    "direct_many",
    "fill",
    "residual",
    "row_gram",
]
