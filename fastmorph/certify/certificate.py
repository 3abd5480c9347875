"""The certificate: what a comparison of two models found, in numbers, in a table and in a sentence."""

from __future__ import annotations

import html
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastmorph.certify.compare import Comparison, dtype_name


@dataclass(frozen=True)
class Certificate:
    """What `verify` found: true when every row holds and at least one of them compared something.

    `dtype` is the coarsest floating dtype among the parameters of both models, `tolerance` that of the rows in it, before the
    parent's own rounding raised any. `where` says which layer is the first to differ, where the certificate fails. `on` says
    what was compared, where that was not the whole models on inputs that the caller gave.
    Prints as a table with a verdict; `to_json` is what certificate.json holds.
    """

    rows: tuple[Comparison, ...]
    dtype: torch.dtype
    modes: tuple[str, ...]
    tolerance: float
    where: str = ""
    on: str = ""

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
    def worst(self) -> Comparison:
        """The row that exceeds its tolerance most or comes closest to it; it names its mode, precision and output."""
        return max(self.rows, key=lambda row: (bool(row.problem), row.max_rel / max(row.tolerance, sys.float_info.min)))

    @property
    def verdict(self) -> str:
        """Whether the certificate holds, and if not, whether the algebra or the rounding is at fault, and in which layer."""
        return " ".join(filter(None, (self._finding, self.where, self.on and f"Compared on {self.on}.")))

    @property
    def _finding(self) -> str:
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
        raised = max((row for row in self.rows if row.raised), key=lambda row: row.tolerance, default=None)
        if raised is not None:
            facts += (
                f"; in {raised.precision} the parent's own rounding is {raised.noise:.1e}, which raises the tolerance"
                f" to {raised.tolerance:.1e}"
            )
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
            "where": self.where,
            "on": self.on,
            "worst": rows[self.rows.index(self.worst)],
            "rows": rows,
        }
        plain: dict[str, Any] = json.loads(json.dumps(found), parse_constant=lambda _: None)
        return plain

    def to_json(self) -> str:
        """`to_dict` as strict JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, self.verdict])

    def _repr_html_(self) -> str:
        """What a notebook shows: the same table, the rows that fail in bold."""
        head, *rows = [[html.escape(cell) for cell in line] for line in self._table()]
        body = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
        for row, cells in zip(self.rows, rows, strict=True):
            tag = "td" if row.holds else "th"
            body.append(f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>")
        return f"<table>{''.join(body)}</table><p>{html.escape(self.verdict)}</p>"

    def _table(self) -> list[list[str]]:
        table = [["mode", "precision", "output", "max abs", "max rel", "tolerance", "parent's rounding", ""]]
        for row in self.rows:
            numbers = (row.max_abs, row.max_rel, row.tolerance, row.noise)
            word = row.unchecked and f"unchecked: {row.unchecked}"
            word = word or ("ok" if row.holds else f"FAILS {row.problem}")
            shown = ["-" if number is None else f"{number:.1e}" for number in numbers]
            table.append([row.mode, row.precision, row.output, *shown, word])
        return table
