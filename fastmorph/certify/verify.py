"""`verify`: does the child compute what its parent computes, and if not, is it the algebra or the rounding?

Parent and child run on the same inputs twice: in their own dtype, as users run them, and in float64. Float64 arithmetic
rounds at 1e-16, so what differs there is an error of the morph, or the rounding of weights that were stored in fewer
bits; what differs in the own dtype alone is rounding. The parent's own rounding is measured beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.compare import TOLERANCES, Comparison, coarsest_dtype, compare, dtype_name, with_noise
from fastmorph.certify.layers import first_difference
from fastmorph.certify.readings import Reading, read, told
from fastmorph.certify.run import run
from fastmorph.errors import MorphError
from fastmorph.inputs import Inputs
from fastmorph.outputs import Outputs


def verify(
    parent: nn.Module,
    child: nn.Module,
    *inputs: Any,
    modes: Sequence[str] = ("eval",),
    tolerance: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
    exact: bool = True,
    readings: Sequence[Reading] = (),
) -> Certificate:
    """Compare `child(*inputs, **kwargs)` with `parent(*inputs, **kwargs)`, in their own dtype and in float64.

    Args:
        parent: the parent. A data-parallel wrapper or a compiled module stands for the network inside.
        child: the child, on the same device.
        inputs: tensors of any shape and dtype, or containers of them; floating ones become float64 for that run.
        modes: "eval", "train" or both.
        tolerance: bounds max |child - parent| / max |parent| of each output. None: 1e-4 in float32 and 2e-5 when that runs
            in float64, 1e-9 in float64, 8 eps and 4 eps for half dtypes. A number holds for every row, so that a child known
            to be inexact can be certified within it; the verdict still tells algebra from rounding. float32 weights hide
            algebra below their own rounding, 1e-7 or so: to look deeper, morph in float64.
        kwargs: keyword inputs.
        exact: False compares in the models' own dtype alone, for half of the cost or less; rounding and algebra are not told
            apart then. A float64 model always runs in float64 alone.
        readings: how the child's outputs are read as the parent's where they are larger: `Morphed.readings`.

    **Outputs** may be nested: tuples, sets, mappings, dataclasses, objects, registered pytrees, iterators (which are consumed).
    Structures, shapes, dtypes, integers and values that are not finite must be equal. What cannot be looked into fails by name.

    **The parent's own rounding** is measured between its own dtype and float64. Where a row exceeds its tolerance and the
    parent computes a part of itself in fewer bits than the row's precision has (a softmax in float32, say), it is measured by
    one more run too, whose values move by one unit in the last place wherever they enter such a part. Without a `tolerance`
    given, a row's tolerance becomes 8 times that, if it is more, and never more than that of the next coarser dtype.

    **Costs** the forward passes, and a cast of each weight to float64 when it is used: one weight's copy at a time, beside
    copies of buffers and inputs. A model that writes into its parameters as it runs, or has TorchScript or wrapped tensors
    inside, runs on a copy of them. A failing certificate runs both models once more, to name the first layer that differs.

    **Nothing is touched**: the modules that run are copies that share the parameters. There are no gradients, and no autocast
    of the caller's. The generators (torch, its CUDA devices if initialised, random, numpy) are put back, so each run starts
    from one state of them, and dropout coincides where both models draw in one order. Runs of several threads take turns. On
    CUDA, cuDNN's TF32 is off for the whole process while a model runs.

    Raises `MorphError` for no inputs, an unknown mode, a bad tolerance, models on different devices or on the meta device, a
    model that cannot be copied or run (in float64: one that fixes another dtype), and outputs without anything to compare.
    """
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or not set(modes) <= {"eval", "train"}:
        raise MorphError(f"modes takes 'eval', 'train' or both, not {modes}.")
    if not inputs and not kwargs:
        raise MorphError("verify runs both models, so it needs the inputs of one call: verify(parent, child, x).")
    call = Inputs(inputs, dict(kwargs or {}))
    devices = [sorted({str(t.device) for t in chain(m.parameters(), m.buffers())}) for m in (parent, child)]
    if all(devices) and devices[0] != devices[1]:
        raise MorphError(f"The parent is on {devices[0]}, the child on {devices[1]}: move both to the same device.")
    dtype = coarsest_dtype((parent, child), pytree.tree_leaves(call))
    if tolerance is None and dtype not in TOLERANCES:
        raise MorphError(f"There is no default tolerance for {dtype_name(dtype)}: pass tolerance=.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise MorphError(f"tolerance is a finite number, 0 or more, not {tolerance}.")
    own_tolerance, exact_tolerance = TOLERANCES[dtype] if tolerance is None else (tolerance, tolerance)

    judge = tolerance is None

    def compare_in(precision: torch.dtype, mode: str, bound: float) -> tuple[list[Comparison], Outputs]:
        before, after = (run(m, who, mode, call, precision) for who, m in (("parent", parent), ("child", child)))
        outputs = read(readings, before.outputs, after.outputs)
        found = list(compare(before.outputs, outputs, mode, precision, bound))
        if judge and before.islands and not all(row.holds for row in found):
            shaken = run(parent, "parent", mode, call, precision, shaken=True)
            found = list(with_noise(found, before.outputs, shaken.outputs, precision, judge=True))
        return found, before.outputs

    rows: list[Comparison] = []
    for mode in modes:
        own, outputs = compare_in(dtype, mode, own_tolerance)
        if exact and dtype != torch.float64:
            in_float64, exact_outputs = compare_in(torch.float64, mode, exact_tolerance)
            own = [*with_noise(own, outputs, exact_outputs, dtype, judge=judge), *in_float64]
        rows += own
    if not rows:
        raise MorphError("The models returned no tensor, so there is nothing to compare.")
    failed, where = [row for row in rows if not row.holds and not row.opaque], ""
    if failed:
        row = next((row for row in failed if row.precision == "float64"), failed[0])
        where = first_difference(parent, child, row.mode, call, getattr(torch, row.precision), row.tolerance, readings)
    return Certificate(tuple(rows), dtype, modes, float(own_tolerance), where, told(readings))
