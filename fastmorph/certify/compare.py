"""One model's outputs against another's: their differences, and the tolerances that these are held to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.certify.outputs import is_float
from fastmorph.outputs import PLAIN, Outputs

# Largest |child - parent| over the output's largest value: (in the own dtype, in the run in float64).
# - float64: solved weights carry the condition of their equation, 1e5 or so, times 2e-16, times depth: 1e-9 leaves
#   room for that and is far below any mistake. Its own arithmetic is float64, so the two are one.
# - float32: the solver (about 2e-6), the rounding of weights and that of every activation, grown by depth: 840 eps.
#   The float64 run's arithmetic is exact, but its weights were rounded when they were stored: a fifth of it.
# - half dtypes: an eps is so large that many would be no bound at all, and sums average it out: 8 eps (0.8 % in
#   float16, 6 % in bfloat16), and half of that for the float64 run.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 2e-5),
    torch.float16: (8 * 2**-10, 4 * 2**-10),
    torch.bfloat16: (8 * 2**-7, 4 * 2**-7),
}
# A parent that rounds more than its dtype says raises a row's tolerance to this many times its own rounding, and to no more
# than the tolerance of the next coarser dtype.
ROUNDINGS = 8
COARSER = {torch.float64: torch.float32, torch.float32: torch.float16}

_NOTHING = object()
_OPAQUE = "verify cannot look into"


@dataclass(frozen=True)
class Comparison:
    """One output in one mode and precision.

    `max_abs` is max |child - parent|; `max_rel` is that over max |parent|, with 0/0 = 0; both are inf where the values
    cannot be subtracted. `noise` is the parent's own rounding on the scale of `max_rel`, None where it is not measured;
    `raised` says that it raised `tolerance`. `problem` says why a row fails whatever its numbers; `unchecked` says why
    there was nothing to compare.
    """

    mode: str
    precision: str
    output: str
    max_abs: float
    max_rel: float
    tolerance: float
    noise: float | None = None
    raised: bool = False
    problem: str = ""
    unchecked: str = ""

    @property
    def opaque(self) -> bool:
        """Whether it fails only because there is no looking into it."""
        return self.problem.startswith(_OPAQUE)

    @property
    def holds(self) -> bool:
        """Whether this output is within its tolerance."""
        return not self.problem and self.max_rel <= self.tolerance


def compare(before: Outputs, after: Outputs, mode: str, dtype: torch.dtype, tolerance: float) -> Iterator[Comparison]:
    """A row for each tensor output, and for whatever else differs or cannot be looked into."""
    for path in dict.fromkeys(chain(before, after)):
        old, new = before.get(path, _NOTHING), after.get(path, _NOTHING)
        max_abs, max_rel, problem, unchecked = 0.0, 0.0, "", ""
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            max_abs, max_rel, problem, unchecked = difference(old, new)
        elif old is new or (isinstance(old, PLAIN) and _kind(old) == _kind(new)) or _are_siblings(old, new):
            continue  # equal; a container's items have rows of their own
        else:
            max_abs = max_rel = math.inf
            problem = f"{_kind(old)} in the parent, {_kind(new)} in the child"
            if not isinstance(old, (Tensor, *PLAIN)) and type(old) is type(new):
                problem = f"{_OPAQUE} a {_kind(old)}; let the model return tensors, or register it as a pytree"
        yield Comparison(mode, dtype_name(dtype), _name(path), max_abs, max_rel, tolerance, None, False, problem, unchecked)


def with_noise(
    rows: Iterable[Comparison], once: Outputs, again: Outputs, dtype: torch.dtype, *, judge: bool
) -> Iterator[Comparison]:
    """The rows with the parent's own rounding: what `again`, the parent in other arithmetic, differs by from `once`.

    With `judge` it raises their tolerances. A difference beyond the tolerance of the next coarser dtype is no rounding: two
    runs that drew different numbers, say.
    """
    limit = TOLERANCES[COARSER[dtype]][0] if judge and dtype in COARSER else 0.0
    outputs = {_name(path): (leaf, again.get(path)) for path, leaf in once.items()}
    for row in rows:
        old, other = outputs.get(row.output, (None, None))
        if not (isinstance(old, Tensor) and isinstance(other, Tensor) and is_float(old) and old.shape == other.shape):
            yield row
            continue
        _, noise, problem, _ = difference(other, old.to(other.dtype))
        noise = max(noise, row.noise or 0.0)
        tolerance = min(ROUNDINGS * noise, limit) if noise <= limit and not problem else 0.0
        raised = row.raised or tolerance > row.tolerance
        yield replace(row, noise=noise, raised=raised, tolerance=max(tolerance, row.tolerance))


def difference(old: Tensor, new: Tensor) -> tuple[float, float, str, str]:
    """(max_abs, max_rel, problem, unchecked) of two tensors."""
    if old.shape != new.shape:
        return math.inf, math.inf, f"shape {(*old.shape,)} in the parent, {(*new.shape,)} in the child", ""
    if old.dtype != new.dtype:
        return math.inf, math.inf, f"dtype {dtype_name(old.dtype)} in the parent, {dtype_name(new.dtype)} in the child", ""
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
    unequal = 0 if is_float(old) else int((old != new).sum())
    return max_abs, max_rel, f"{unequal} of {a.numel()} integer or bool values differ" if unequal else "", ""


def coarsest_dtype(models: Iterable[nn.Module], inputs: Iterable[Any]) -> torch.dtype:
    """That of the floating parameters; where there are none, of the buffers, then of the inputs."""
    models = list(models)
    parameters, buffers = ([p for m in models for p in m.parameters()], [b for m in models for b in m.buffers()])
    for group in (parameters, buffers, inputs):
        dtypes = {t.dtype.to_real() for t in group if isinstance(t, Tensor) and is_float(t)}
        if dtypes:
            return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.get_default_dtype()


def _name(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path)) or "output"


def _kind(value: Any) -> str:
    """What stands at one place of an output, in a word; plain values in full."""
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, type) or not isinstance(value, PLAIN):
        return "Tensor" if isinstance(value, Tensor) else (value if isinstance(value, type) else type(value)).__name__
    return repr(value)


def _are_siblings(old: object, new: object) -> bool:
    """Whether these are classes of outputs with one base in transformers: of a model, and of the same with experts."""
    if not (isinstance(old, type) and isinstance(new, type)) or old.__base__ is not new.__base__:
        return False
    packages = {cls.__module__.partition(".")[0] for cls in (old, new, old.__base__ or object)}
    return packages == {"transformers"}


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")
