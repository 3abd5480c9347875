"""`verify`: does the child compute what its parent computes, and if not, is it the algebra or the rounding?

Parent and child run on the same inputs twice: in their own dtype, as users run them, and as float64 copies. Float64
arithmetic rounds at 1e-16, so what differs there is an error of the morph, or the rounding of weights that were stored
in fewer bits; what differs in the own dtype alone is rounding. The parent's own rounding is measured beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastmorph.certify.certificate import TOLERANCES, Certificate, Row, coarsest_dtype, compare, dtype_name
from fastmorph.certify.outputs import Path, copied, flatten, isolated, widened
from fastmorph.errors import MorphError
from fastmorph.nn.computed import computed_copies


def verify(
    parent: nn.Module,
    child: nn.Module,
    *inputs: Any,
    modes: Sequence[str] = ("eval",),
    tolerance: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Certificate:
    """Compare `child(*inputs, **kwargs)` with `parent(*inputs, **kwargs)`, in their own dtype and as float64 copies.

    Inputs are tensors of any shape and dtype, or containers of them; floating ones become float64 for the copies.
    Outputs may be nested (tuples, mappings, dataclasses, registered pytrees); structures, shapes, dtypes, integers and
    values that are not finite must be equal. A float64 model is its own float64 copy and runs once.

    `modes` are "eval", "train" or both. `tolerance` bounds max |child - parent| / max |parent| of each output. None:
    1e-4 in float32 and 2e-5 in its float64 copies, 1e-9 in float64, 8 eps and 4 eps for half dtypes. A number holds for
    every row, so that a child known to be inexact can be certified within it; the verdict still tells algebra from
    rounding. float32 weights hide algebra below their own rounding, 1e-7 or so: to look deeper, morph in float64.

    Nothing is touched: each run has copies of the model and the inputs, without gradients, and the generators (torch,
    its CUDA devices if initialised, random, numpy) are put back. So each run starts from one state of them, and dropout
    coincides where both models draw in one order.

    Raises `MorphError` for no inputs, an unknown mode, a bad tolerance, models on different devices, a model that
    cannot be copied or run (in float64: one that fixes another dtype), and outputs without anything to compare.
    """
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or not set(modes) <= {"eval", "train"}:
        raise MorphError(f"modes takes 'eval', 'train' or both, not {modes}.")
    if not inputs and not kwargs:
        raise MorphError("verify runs both models, so it needs the inputs of one call: verify(parent, child, x).")
    devices = [sorted({str(t.device) for t in chain(m.parameters(), m.buffers())}) for m in (parent, child)]
    if all(devices) and devices[0] != devices[1]:
        raise MorphError(f"The parent is on {devices[0]}, the child on {devices[1]}: move both to the same device.")
    dtype = coarsest_dtype(parent, child, pytree.tree_leaves((inputs, kwargs)))
    if tolerance is None and dtype not in TOLERANCES:
        raise MorphError(f"There is no default tolerance for {dtype_name(dtype)}: pass tolerance=.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise MorphError(f"tolerance is a finite number, 0 or more, not {tolerance}.")
    own_tolerance, copies_tolerance = TOLERANCES[dtype] if tolerance is None else (tolerance, tolerance)

    models, call = (("parent", parent), ("child", child)), (inputs, dict(kwargs or {}))
    rows: list[Row] = []
    for mode in modes:
        before, after = (_run(model, who, mode, call) for who, model in models)
        if dtype == torch.float64:
            rows += compare(before, after, before, mode, dtype, own_tolerance)
            continue
        exact_before, exact_after = (_run(model, who, mode, call, exact=True) for who, model in models)
        rows += compare(before, after, exact_before, mode, dtype, own_tolerance)
        rows += compare(exact_before, exact_after, exact_before, mode, torch.float64, copies_tolerance)
    if not rows:
        raise MorphError("The models returned no tensor, so there is nothing to compare.")
    return Certificate(tuple(rows), dtype, modes, float(own_tolerance))


def _run(
    model: nn.Module, who: str, mode: str, call: tuple[tuple[Any, ...], dict[str, Any]], exact: bool = False
) -> dict[Path, Any]:
    """The flattened outputs of a copy of the model on copies of the inputs, all in float64 where `exact`."""
    try:
        # A fresh copy each time: a run in train mode moves BatchNorm's statistics, and the next must not see that.
        model = deepcopy(model, computed_copies(model))
        if exact:
            model.double()
            for tensor in chain(model.parameters(), model.buffers()):
                if tensor.is_complex():  # .double() leaves these as they are
                    tensor.data = widened(tensor.data)
        model.train(mode == "train")
        # Inputs too: a model that works in place must not change what the next run sees.
        args, kwargs = pytree.tree_map(lambda leaf: copied(leaf, exact), call)
        with isolated(exact):
            return dict(flatten(model(*args, **kwargs)))
    except Exception as error:
        what = f"The float64 copy of the {who}" if exact else f"The {who}"
        hint = " Without it algebra cannot be told from rounding; let the module follow its weights' dtype." * exact
        raise MorphError(f"{what} could not be run in {mode} mode: {type(error).__name__}: {error}.{hint}") from error
