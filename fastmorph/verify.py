"""`verify`: does the child compute what its parent computes, and if not, is it the algebra or the rounding?

Parent and child run on the same inputs twice: in their own dtype, as users run them, and as float64 copies. Float64
arithmetic rounds at 1e-16, so what differs there is an error of the morph, or the rounding of weights that were stored
in fewer bits; what differs in the own dtype alone is rounding. The parent's own rounding is measured beside it.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError

# Largest |child - parent| over the output's largest value: (in the own dtype, in the float64 copies).
# - float64: solved weights carry the condition of their equation, 1e5 or so, times 2e-16, times depth: 1e-9 leaves
#   room for that and is far below any mistake. Its own arithmetic is float64, so the two are one.
# - float32: the solver (about 2e-6), the rounding of weights and that of every activation, grown by depth: 840 eps.
#   The copies' arithmetic is exact, but their weights were rounded when they were stored: a fifth of it.
# - half dtypes: an eps is so large that many would be no bound at all, and sums average it out: 8 eps (0.8 % in
#   float16, 6 % in bfloat16), and half of that for the copies.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 2e-5),
    torch.float16: (8 * 2**-10, 4 * 2**-10),
    torch.bfloat16: (8 * 2**-7, 4 * 2**-7),
}
_PLAIN = (type(None), str, bytes, torch.dtype, torch.device)  # outputs that are no numbers but can be told apart
_NOTHING = object()
_Path = tuple[object, ...]


@dataclass(frozen=True)
class Row:
    """One output in one mode and precision.

    `max_abs` is max |child - parent|; `max_rel` is that over max |parent|, with 0/0 = 0; both are inf where the values
    cannot be subtracted. `noise` is the parent's own rounding on the scale of `max_rel`, None where it is not measured.
    `problem` says why a row fails whatever its numbers; `unchecked` says why there was nothing to compare.
    """

    mode: str
    precision: str
    output: str
    max_abs: float
    max_rel: float
    tolerance: float
    noise: float | None = None
    problem: str = ""
    unchecked: str = ""

    @property
    def holds(self) -> bool:
        """Whether this output is within its tolerance."""
        return not self.problem and self.max_rel <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """What `verify` found: true when every row holds and at least one of them compared something.

    `dtype` is the coarsest floating dtype among the parameters of both models, `tolerance` that of the rows in it.
    Prints as a table with a verdict; `to_json` is what certificate.json holds.
    """

    rows: tuple[Row, ...]
    dtype: torch.dtype
    modes: tuple[str, ...]
    tolerance: float

    def __bool__(self) -> bool:
        return all(row.holds for row in self.rows) and not all(row.unchecked for row in self.rows)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all rows; inf where values could not be subtracted."""
        return max(row.max_abs for row in self.rows)

    @property
    def max_rel(self) -> float:
        """Largest relative difference over all rows; inf where values could not be subtracted."""
        return max(row.max_rel for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row that exceeds its tolerance most or comes closest to it; it names its mode, precision and output."""
        return max(self.rows, key=lambda row: (bool(row.problem), row.max_rel / max(row.tolerance, sys.float_info.min)))

    @property
    def verdict(self) -> str:
        """A sentence: whether the certificate holds, and if not, whether the algebra or the rounding is at fault."""
        exact = [row for row in self.rows if row.precision == "float64"]
        rounded = [row for row in self.rows if row.precision != "float64"]
        algebra_holds, worst = all(row.holds for row in exact), self.worst
        if worst.problem:
            rest = " The float64 copies agree: rounding, not algebra." if exact and algebra_holds else ""
            return f"FAILS: {worst.output} ({worst.mode}, {worst.precision}): {worst.problem}.{rest}"
        if all(row.unchecked for row in self.rows):
            return "FAILS: no output holds a finite number, so nothing was compared."
        algebra = max((row.max_rel for row in exact), default=0.0)
        facts = f"child and parent differ by {algebra:.1e} of the output's largest value in float64"
        if rounded:
            noise = max((row.noise for row in rounded if row.noise is not None), default=0.0)
            facts += (
                f" (algebra and the rounding of {rounded[0].precision} weights), in {rounded[0].precision}"
                f" by {max(row.max_rel for row in rounded):.1e} (the parent's own rounding: {noise:.1e})"
            )
        fault = "rounding, not in algebra" if algebra_holds else "algebra, not in rounding alone"
        return f"{'HOLDS' if self else f'FAILS in {fault}'}: {facts}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become None, for JSON has no word for them."""
        rows = [{**asdict(row), "holds": row.holds} for row in self.rows]
        found = {
            "holds": bool(self),
            "verdict": self.verdict,
            "dtype": _name(self.dtype),
            "modes": self.modes,
            "tolerance": self.tolerance,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "worst": rows[self.rows.index(self.worst)],
            "rows": rows,
        }
        plain: dict[str, Any] = json.loads(json.dumps(found), parse_constant=lambda _: None)
        return plain

    def to_json(self) -> str:
        """`to_dict` as strict JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        table = [["mode", "precision", "output", "max abs", "max rel", "tolerance", "parent's rounding", ""]]
        for row in self.rows:
            numbers = (row.max_abs, row.max_rel, row.tolerance, row.noise)
            word = row.unchecked and f"unchecked: {row.unchecked}"
            word = word or ("ok" if row.holds else f"FAILS {row.problem}")
            shown = ["-" if number is None else f"{number:.1e}" for number in numbers]
            table.append([row.mode, row.precision, row.output, *shown, word])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, self.verdict])


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
    dtype = _coarsest_dtype(parent, child, pytree.tree_leaves((inputs, kwargs)))
    if tolerance is None and dtype not in _TOLERANCES:
        raise MorphError(f"There is no default tolerance for {_name(dtype)}: pass tolerance=.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise MorphError(f"tolerance is a finite number, 0 or more, not {tolerance}.")
    own_tolerance, copies_tolerance = _TOLERANCES[dtype] if tolerance is None else (tolerance, tolerance)

    models, call = (("parent", parent), ("child", child)), (inputs, dict(kwargs or {}))
    rows: list[Row] = []
    for mode in modes:
        before, after = (_run(model, who, mode, call) for who, model in models)
        if dtype == torch.float64:
            rows += _compare(before, after, before, mode, dtype, own_tolerance)
            continue
        exact_before, exact_after = (_run(model, who, mode, call, exact=True) for who, model in models)
        rows += _compare(before, after, exact_before, mode, dtype, own_tolerance)
        rows += _compare(exact_before, exact_after, exact_before, mode, torch.float64, copies_tolerance)
    if not rows:
        raise MorphError("The models returned no tensor, so there is nothing to compare.")
    return Certificate(tuple(rows), dtype, modes, float(own_tolerance))


def _run(
    model: nn.Module, who: str, mode: str, call: tuple[tuple[Any, ...], dict[str, Any]], exact: bool = False
) -> dict[_Path, Any]:
    """The flattened outputs of a copy of the model on copies of the inputs, all in float64 where `exact`."""
    try:
        # A fresh copy each time: a run in train mode moves BatchNorm's statistics, and the next must not see that.
        model = deepcopy(model)
        if exact:
            model.double()
            for tensor in chain(model.parameters(), model.buffers()):
                if tensor.is_complex():  # .double() leaves these as they are
                    tensor.data = _widen(tensor.data)
        model.train(mode == "train")
        # Inputs too: a model that works in place must not change what the next run sees.
        args, kwargs = pytree.tree_map(lambda leaf: _copy(leaf, exact), call)
        with _isolated(exact):
            return dict(_flatten(model(*args, **kwargs)))
    except Exception as error:
        what = f"The float64 copy of the {who}" if exact else f"The {who}"
        hint = " Without it algebra cannot be told from rounding; let the module follow its weights' dtype." * exact
        raise MorphError(f"{what} could not be run in {mode} mode: {type(error).__name__}: {error}.{hint}") from error


@contextmanager
def _isolated(exact: bool) -> Iterator[None]:
    """No gradients, and all global state put back after.

    That includes the generators, so every run starts from one state of them and parent and child draw the same numbers.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    # cuDNN runs float32 convolutions and RNNs in TF32 (1e-3) unless told not to, and no float32 tolerance would hold.
    # Matrix products do that only where the user asked for it, and then their rounding is the user's.
    cudnn = [getattr(torch.backends.cudnn, name) for name in ("conv", "rnn")]
    precisions, default_dtype = [op.fp32_precision for op in cudnn], torch.get_default_dtype()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the generator that models use)
    with torch.random.fork_rng(cuda, device_type="cuda"), torch.no_grad():
        try:
            if exact:
                torch.set_default_dtype(torch.float64)  # for what forward itself makes: an RNN's first state, say
            for op in cudnn:
                op.fp32_precision = "ieee"
            yield
        finally:
            for op, precision in zip(cudnn, precisions, strict=True):
                op.fp32_precision = precision
            torch.set_default_dtype(default_dtype)
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def _compare(
    before: dict[_Path, Any],
    after: dict[_Path, Any],
    exact_before: dict[_Path, Any],
    mode: str,
    dtype: torch.dtype,
    tolerance: float,
) -> Iterator[Row]:
    """A row for each tensor output and for whatever else differs; `exact_before`, the parent in float64, for noise."""
    for path in dict.fromkeys(chain(before, after)):
        old, new, exact = (outputs.get(path, _NOTHING) for outputs in (before, after, exact_before))
        max_abs, max_rel, noise, problem, unchecked = 0.0, 0.0, None, "", ""
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            max_abs, max_rel, problem, unchecked = _difference(old, new)
            if dtype != torch.float64 and _is_float(old) and isinstance(exact, Tensor) and exact.shape == old.shape:
                noise = _difference(exact, old.to(exact.dtype))[1]
        elif _kind(old) != _kind(new):
            max_abs = max_rel = math.inf
            problem = f"{_kind(old)} in the parent, {_kind(new)} in the child"
        elif isinstance(old, (type, *_PLAIN)):
            continue  # equal; a container's items have rows of their own
        else:
            unchecked = f"verify cannot look into a {_kind(old)}"
        name = ".".join(map(str, path)) or "output"
        yield Row(mode, _name(dtype), name, max_abs, max_rel, tolerance, noise, problem, unchecked)


def _difference(old: Tensor, new: Tensor) -> tuple[float, float, str, str]:
    """(max_abs, max_rel, problem, unchecked) of two tensors."""
    if old.shape != new.shape:
        return math.inf, math.inf, f"shape {(*old.shape,)} in the parent, {(*new.shape,)} in the child", ""
    if old.dtype != new.dtype:
        return math.inf, math.inf, f"dtype {_name(old.dtype)} in the parent, {_name(new.dtype)} in the child", ""
    wide, new = torch.complex128 if old.is_complex() else torch.float64, new.to(old.device)
    a, b = old.to(wide), new.to(wide)
    finite = a.isfinite() & b.isfinite()
    astray = int((~finite & (a != b) & ~(a.isnan() & b.isnan())).sum())
    if astray:
        return math.inf, math.inf, f"{astray} of {a.numel()} values are NaN or infinite, and not alike in both", ""
    if not finite.any():
        return 0.0, 0.0, "", "it holds no finite number"
    max_abs, scale = float((b - a)[finite].abs().max()), float(a[finite].abs().max())
    max_rel = 0.0 if max_abs == 0 else max_abs / scale if scale else math.inf
    # Integers are compared as they are: float64 cannot hold every int64.
    unequal = 0 if _is_float(old) else int((old != new).sum())
    return max_abs, max_rel, f"{unequal} of {a.numel()} integer or bool values differ" if unequal else "", ""


def _flatten(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """(path, leaf) for each leaf, and (path, its type) for each container, which tells a list from a tuple."""
    items: Iterable[tuple[object, Any]]
    if isinstance(value, Tensor):
        yield path, value.detach()
        return
    if isinstance(value, (bool, int, float, complex)):
        yield path, torch.as_tensor(np.asarray(value))  # by way of numpy, which keeps a Python float's 64 bits
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:  # a container registered with PyTorch, or else a leaf, which is its own only item
        leaves = pytree.tree_leaves(value, is_leaf=lambda node: node is not value)
        if len(leaves) == 1 and leaves[0] is value:
            yield path, value
            return
        items = enumerate(leaves)
    yield path, type(value)
    for key, item in items:
        yield from _flatten(item, (*path, key))


def _copy(leaf: Any, exact: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return deepcopy(leaf)
    return _widen(leaf.detach().clone()) if exact else leaf.detach().clone()


def _widen(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _coarsest_dtype(parent: nn.Module, child: nn.Module, inputs: list[Any]) -> torch.dtype:
    """That of the floating parameters; where there are none, of the buffers, then of the inputs."""
    parameters, buffers = ([*parent.parameters(), *child.parameters()], [*parent.buffers(), *child.buffers()])
    for group in (parameters, buffers, inputs):
        dtypes = {t.dtype.to_real() for t in group if isinstance(t, Tensor) and _is_float(t)}
        if dtypes:
            return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.get_default_dtype()


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _kind(value: Any) -> str:
    """What stands at one place of an output, in a word; plain values in full."""
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, _PLAIN):
        return repr(value)
    return "Tensor" if isinstance(value, Tensor) else (value if isinstance(value, type) else type(value)).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
