"""What a certificate says of outputs of any kind, and how it reads."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from pairs import Apply, X, family, returning
from torch import Tensor, nn

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.compare import Comparison
from fastmorph.certify.verify import verify

# --- outputs ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Output:
    logits: Tensor
    states: tuple[Tensor, ...]


def test_nested_outputs_have_readable_names() -> None:
    def nested(y: Tensor) -> dict[str, Any]:
        top = torch.max(y, dim=1)  # a named tuple of floats and integers
        return {
            "a": [y, (y * 2, None)],
            "output": Output(y, (y, y + 1)),
            "top": top,
            "loss": y.sum().item(),
            "is": "b",
            "pair": Pair(y, y),
        }

    parent, child, x = family()
    certificate = verify(Apply(nested, parent), Apply(nested, child), x)
    assert certificate
    assert not any(row.unchecked for row in certificate.rows)
    names = ["a.0", "a.1.0", "output.logits", "output.states.0", "output.states.1", "top.0", "top.1", "loss"]
    names += ["pair.left", "pair.right"]
    assert [row.output for row in certificate.rows] == names

    def shifted(y: Tensor) -> dict[str, Any]:
        found = nested(y)
        found["output"].states[1].add_(0.1)
        return found

    certificate = verify(Apply(nested, parent), Apply(shifted, child), x)
    assert [row.output for row in certificate.rows if not row.holds] == ["output.states.1"]
    assert certificate.worst.output == "output.states.1"


def test_a_returned_parameter_is_compared() -> None:
    class Weight(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    model = Weight(3, 2)
    assert verify(model, deepcopy(model), X)
    assert not verify(model, Weight(3, 2), X)


@pytest.mark.parametrize(
    ("old", "new", "where", "word"),
    [
        (X, torch.ones(2, 4), "output", "shape (2, 3) in the parent, (2, 4) in the child"),
        (X, torch.ones(1, 3), "output", "shape (2, 3) in the parent, (1, 3) in the child"),  # would broadcast
        (X, X.double(), "output", "dtype float32 in the parent, float64 in the child"),
        (X, [X], "output", "Tensor in the parent, list in the child"),
        ([X], (X,), "output", "list in the parent, tuple in the child"),
        ([X], [X, X], "1", "nothing in the parent, Tensor in the child"),
        ({"a": X, "b": X}, {"a": X}, "b", "Tensor in the parent, nothing in the child"),
        ([X, None], [X, X], "1", "None in the parent, Tensor in the child"),
        ([X, "a"], [X, "b"], "1", "'a' in the parent, 'b' in the child"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "output", "1 of 2 integer or bool values differ"),
        (torch.tensor([True, True]), torch.tensor([True, False]), "output", "1 of 2 integer or bool values differ"),
        (torch.tensor([2**60]), torch.tensor([2**60 + 1]), "output", "1 of 1 integer or bool values differ"),
        (torch.tensor([math.nan, 1]), torch.tensor([1.0, 1]), "output", "1 of 2 values are NaN or infinite"),
        (torch.tensor([1.0, 1]), torch.tensor([math.nan, 1]), "output", "1 of 2 values are NaN or infinite"),
        (torch.tensor([math.inf, 1]), torch.tensor([-math.inf, 1]), "output", "1 of 2 values are NaN or infinite"),
        (torch.tensor([math.inf, 1]), torch.tensor([math.nan, 1]), "output", "1 of 2 values are NaN or infinite"),
    ],
)
def test_outputs_of_another_kind_fail_in_words(old: Any, new: Any, where: str, word: str) -> None:
    certificate = verify(returning(old), returning(new), X)
    assert not certificate
    assert certificate.worst.output == where
    assert certificate.verdict.startswith(f"FAILS: {where} (eval, ")
    assert f"): {word}" in certificate.verdict
    assert "rounding" not in certificate.verdict


def test_an_overflow_of_the_own_dtype_is_told_from_algebra() -> None:
    certificate = verify(Apply(lambda y: y + 0), Apply(lambda y: y * 6e4 / 6e4), torch.tensor([1.0, 2.0]).half())
    assert not certificate
    assert "(eval, float16): 1 of 2 values are NaN or infinite" in certificate.verdict
    assert "The float64 copies agree: rounding, not algebra." in certificate.verdict


def test_equal_values_that_are_not_finite_hold_and_the_rest_is_still_compared() -> None:
    old = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    assert only_finite(verify(returning(old), returning(old.clone()), X)) == 0.0
    new = old.clone()
    new[3] = 3.0
    certificate = verify(returning(old), returning(new), X)
    assert not certificate
    assert only_finite(certificate) == 0.5


def only_finite(certificate: Certificate) -> float:
    assert not any(row.problem for row in certificate.rows)
    return certificate.max_rel


def test_zero_outputs_and_a_zero_parent() -> None:
    zero = torch.zeros(3)
    assert verify(returning(zero), returning(zero), X).max_rel == 0.0
    certificate = verify(returning(zero), returning(zero + 1e-30), X)
    assert not certificate
    assert certificate.max_rel == math.inf


@pytest.mark.parametrize("value", [torch.full((2,), math.nan), torch.zeros(0, 3)])
def test_a_certificate_that_compared_nothing_does_not_hold(value: Any) -> None:
    certificate = verify(returning(value), returning(deepcopy(value)), X)
    assert all(row.holds and row.unchecked for row in certificate.rows)
    assert not certificate
    assert "nothing was compared" in certificate.verdict
    beside = verify(returning(value, X), returning(deepcopy(value), X), X)
    assert beside
    assert "unchecked" in str(beside)


# --- the certificate -------------------------------------------------------------------------------------------------


def test_json_round_trip_is_strict() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    certificate = verify(*family(error=1e-3, dtype=torch.float32), modes=("eval", "train"))
    data = json.loads(certificate.to_json(), parse_constant=refuse)
    assert data == certificate.to_dict()
    assert (data["holds"], data["dtype"], data["modes"]) == (False, "float32", ["eval", "train"])
    assert [(row["mode"], row["precision"]) for row in data["rows"]] == [
        ("eval", "float32"),
        ("eval", "float64"),
        ("train", "float32"),
        ("train", "float64"),
    ]
    assert data["max_rel"] == certificate.max_rel
    keys = Comparison.__dataclass_fields__
    assert Comparison(**{key: data["worst"][key] for key in keys}) == certificate.worst
    infinite = verify(returning(X), returning([X]), X)
    assert infinite.max_abs == math.inf
    assert json.loads(infinite.to_json(), parse_constant=refuse)["max_abs"] is None


def test_the_worst_row_is_measured_by_its_tolerance_and_a_problem_comes_first() -> None:
    own = Comparison("eval", "float32", "output", max_abs=1.0, max_rel=5e-5, tolerance=1e-4)
    exact = Comparison("eval", "float64", "output", max_abs=0.5, max_rel=3e-5, tolerance=2e-5)
    integers = Comparison("eval", "float64", "index", max_abs=1.0, max_rel=1e-5, tolerance=2e-5, problem="1 of 9 differ")
    assert Certificate((own, exact), torch.float32, ("eval",), 1e-4).worst is exact
    assert Certificate((own, exact, integers), torch.float32, ("eval",), 1e-4).worst is integers


def test_the_table_is_aligned_and_ends_with_the_verdict() -> None:
    certificate = verify(*family(dtype=torch.float32), modes=("eval", "train"))
    head, *rows, verdict = str(certificate).splitlines()
    assert len(rows) == 4
    assert all(row.endswith("ok") for row in rows)
    column = head.index("max rel")
    assert [row[column : column + 7] for row in rows] == [f"{row.max_rel:.1e}" for row in certificate.rows]
    assert verdict == certificate.verdict
    assert "float64" in verdict
    assert "parent's own rounding" in verdict


def test_a_notebook_shows_the_same_table_with_what_fails_in_bold() -> None:
    parent, child = nn.Linear(3, 2), nn.Linear(3, 2)
    for certificate in (verify(parent, child, torch.ones(1, 3)), verify(parent, parent, torch.ones(1, 3))):
        shown = certificate._repr_html_()
        cells = [line.split("  ") for line in str(certificate).splitlines()[1:-1]]
        assert shown.count("<tr>") == len(cells) + 1
        for line in cells:
            tag = "td" if certificate else "th"
            assert f"<{tag}>{line[0].strip()}</{tag}>" in shown
        assert certificate.verdict.replace("'", "&#x27;") in shown
