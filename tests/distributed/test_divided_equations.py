"""Equations divided among ranks: the bits of one process, whoever has the weights and whoever wants the answers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fastmorph as fm
from fastmorph.equation.divided import deal


def problems():
    """Closed forms, half-steps, iterations, one of low rank, groups, two alike, very small entries."""
    torch.manual_seed(0)
    weak = torch.randn(12, 4, dtype=torch.float64) @ torch.randn(4, 12, dtype=torch.float64)
    return [
        fm.Problem(torch.randn(8, 6, 3, 3), 12),
        fm.Problem(torch.randn(8, 6, 3, 3), 12),
        fm.Problem(torch.randn(9, 8), 20, spatial_dims=0),
        fm.Problem(weak, 5, spatial_dims=0),
        fm.Problem(torch.randn(2, 4, 4, 5, 5, dtype=torch.float64), 40, (3, 3)),
        fm.Problem(torch.randn(8, 6, 3, 3) * 1e-30, 12),
        fm.Problem(torch.randn(6, 5, 4, dtype=torch.float64), 9, (2, 3), 1),
    ]


def placed(all_of_them, everywhere):
    """On this rank: its share of the weights, the last one's replaced by None; or all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return [
        p if everywhere or index % size == rank else fm.Problem(None, p.hidden_channels, p.kernel_sizes, p.spatial_dims)
        for index, p in enumerate(all_of_them)
    ]


def solves_as_alone(destination, everywhere, budget):
    whole = problems()
    options = {"generator": 3, "memory_budget": budget}
    found = fm.decompose_many(placed(whole, everywhere), process_group=dist.group.WORLD, destination=destination, **options)
    if destination not in (None, dist.get_rank()):
        return found == [None] * len(whole)
    for one, two in zip(found, fm.decompose_many(whole, **options), strict=True):
        for key in ("first", "second", "residual", "iterations", "converged"):
            assert torch.equal(getattr(one, key), getattr(two, key)), key
        assert (one.solver, one.reason, one.cost, one.estimated) == (two.solver, two.reason, two.cost, two.estimated)
    return True


@pytest.mark.parametrize(
    ("destination", "everywhere", "budget"), [(None, False, 2**31), (1, False, 0), (None, True, 0), (0, True, 2**31)]
)
def test_the_answers_are_those_of_one_process(two, destination, everywhere, budget):
    assert all(two.run(solves_as_alone, destination, everywhere, budget))


def test_on_four_ranks(four):
    assert all(four.run(solves_as_alone, None, False, 0))


def refused(case):
    rank = dist.get_rank()
    one, two = fm.Problem(torch.randn(4, 4, 3, 3), 6), fm.Problem(None, 6)
    strange, full = fm.Problem(torch.full((4, 4, 3, 3), torch.nan), 6), fm.Problem(torch.eye(4), 2, spatial_dims=0)
    square = torch.randn(6, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    given, options = {
        "nowhere": ([one if rank == 0 else two, two], {}),
        "lists": ([one] * (1 + rank), {}),
        "seeds": ([one], {"generator": rank}),
        "arrays": ([fm.Problem(torch.ones(2, 2).numpy(), 4, spatial_dims=0)], {}),
        "few": ([one if rank else two, full], {}),
        "one": ([one if rank else strange], {}),
        "inexact": ([fm.Problem(square, 7, (2, 2))], {"solver": fm.General(max_iter=1), "generator": 1}),
    }[case]
    try:
        fm.decompose_many(given, process_group=dist.group.WORLD, **options)
    except fm.MorphError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("case", "words", "kinds"),
    [
        ("nowhere", "problem 1 has its weight on no rank", {"MorphError"}),
        ("lists", "the ranks have 1, 2 problems", {"MorphError"}),
        ("seeds", "the same on all ranks: rank 0 has [0], rank 1 has [1]", {"RankError"}),
        ("arrays", "problem 0: its weight is a ndarray", {"MorphError"}),
        ("few", "problem 1: ", {"MorphError", "RankError"}),
        ("one", "are NaN or infinite", {"MorphError", "RankError"}),
        ("inexact", "left a relative residual", {"InexactMorphError"}),
    ],
)
def test_an_error_is_one_on_all_ranks(two, case, words, kinds):
    found = two.run(refused, case)
    assert all(words in text for _, text in found), found
    assert {kind for kind, _ in found} == kinds


def test_the_costliest_are_dealt_first_to_whoever_has_least():
    assert deal([1, 8, 3, 3, 2], 2) == [[1, 0], [2, 3, 4]]
    assert deal([], 3) == [[], [], []]
    costs = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    loads = [sum(costs[number] for number in mine) for mine in deal(costs, 4)]
    assert max(loads) <= 4 / 3 * max(sum(costs) / 4, max(costs)), "Graham's bound"


def test_without_a_group_a_process_is_told_so():
    with pytest.raises(fm.MorphError, match=r"no process group: call torch\.distributed\.init_process_group"):
        fm.distributed.morph(torch.nn.Linear(2, 2), [])
