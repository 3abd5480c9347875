"""Rows of different lengths, and classes of channels, are found alike exactly when they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from widening import Net, randn, trained

import fastmorph as fm
from fastmorph.graph import ragged
from fastmorph.graph.coupling import kinds
from fastmorph.graph.edges import unique
from fastmorph.graph.ragged import first_alike, positions, scrambled


@pytest.mark.parametrize("collide", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_alike_when_they_hold_the_same(seed, collide, monkeypatch):
    """Also where sums of all rows agree, so that only the comparison entry by entry tells them apart."""
    if collide:
        monkeypatch.setattr(ragged, "scrambled", lambda numbers: np.zeros_like(numbers))
    random = np.random.default_rng(seed)
    rows = [random.integers(0, 2, (random.integers(0, 4), 2)) for _ in range(60)]
    lengths = np.array([len(row) for row in rows])
    one, two = np.concatenate(rows).T
    seen: dict[bytes, int] = {}
    expected = [seen.setdefault(row.tobytes() + bytes([len(row)]), place) for place, row in enumerate(rows)]
    assert first_alike(lengths, one, two).tolist() == expected


def test_no_rows():
    none = np.zeros(0, np.int64)
    assert first_alike(none, none).tolist() == []
    assert first_alike(np.zeros(3, np.int64), none).tolist() == [0, 0, 0]
    assert positions(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


def test_scrambled_numbers_are_splitmix():
    """The first outputs of the generator started at 0 (Steele et al. 2014), and no two alike among many."""
    assert [hex(int(n) % 2**64) for n in scrambled(np.arange(2))] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    assert len(np.unique(scrambled(np.arange(100_000)))) == 100_000


def shuffled():
    def forward(m, x):
        x = torch.relu(m.stem(x))
        a, b = x.chunk(2, 1)
        x = nn.functional.channel_shuffle(torch.cat([a.exp(), m.side(b)], 1), 2)
        return m.head(m.grouped(x).flatten(1))

    layers = {"stem": nn.Conv2d(3, 12, 1), "side": nn.Conv2d(6, 6, 1), "grouped": nn.Conv2d(12, 8, 1, groups=4)}
    return trained(Net(forward, **layers, head=nn.Linear(72, 2)))


@pytest.mark.parametrize("wider", [frozenset(), frozenset({"groups"})])
def test_kinds_are_those_of_classes_compared_one_by_one(wider):
    coupling = fm.follow(shuffled(), randn(1, 3, 3, 3)).coupling(wider)
    names = np.unique(coupling.classes)
    assert coupling.names.tolist() == names.tolist()
    seen: dict[tuple[bytes, ...], int] = {}
    expected = []
    for cls in names.tolist():
        members = np.flatnonzero(coupling.classes == cls)
        ties = coupling.edges[coupling.classes[coupling.edges[:, 0]] == cls]
        places, signatures = coupling.places[members], coupling.signatures[members]
        key = (places.tobytes(), signatures.tobytes(), unique(np.searchsorted(members, ties)).tobytes())
        expected.append(seen.setdefault(key, cls))
    assert 1 < len(seen) < len(names)
    for found in (coupling.kinds, *kinds(coupling, coupling), *kinds(coupling, among=names)):
        first = dict(zip(found[names[::-1]].tolist(), names[::-1].tolist(), strict=True))
        assert [first[kind] for kind in found[names].tolist()] == expected
