"""What a comparison of two models found: rows of differences, the tolerances they are held to, and the certificate."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.certify.outputs import Path

# Largest |child - parent| over the output's largest value: (in the own dtype, in the float64 copies).
# - float64: solved weights carry the condition of their equation, 1e5 or so, times 2e-16, times depth: 1e-9 leaves
#   room for that and is far below any mistake. Its own arithmetic is float64, so the two are one.
# - float32: the solver (about 2e-6), the rounding of weights and that of every activation, grown by depth: 840 eps.
#   The copies' arithmetic is exact, but their weights were rounded when they were stored: a fifth of it.
# - half dtypes: an eps is so large that many would be no bound at all, and sums average it out: 8 eps (0.8 % in
#   float16, 6 % in bfloat16), and half of that for the copies.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 2e-5),
    torch.float16: (8 * 2**-10, 4 * 2**-10),
    torch.bfloat16: (8 * 2**-7, 4 * 2**-7),
}

_PLAIN = (type(None), str, bytes, torch.dtype, torch.device)  # outputs that are no numbers but can be told apart
_NOTHING = object()


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
            "dtype": dtype_name(self.dtype),
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


def compare(
    before: dict[Path, Any],
    after: dict[Path, Any],
    exact_before: dict[Path, Any],
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
        yield Row(mode, dtype_name(dtype), name, max_abs, max_rel, tolerance, noise, problem, unchecked)


def _difference(old: Tensor, new: Tensor) -> tuple[float, float, str, str]:
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
    unequal = 0 if _is_float(old) else int((old != new).sum())
    return max_abs, max_rel, f"{unequal} of {a.numel()} integer or bool values differ" if unequal else "", ""


def coarsest_dtype(parent: nn.Module, child: nn.Module, inputs: list[Any]) -> torch.dtype:
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


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")
