"""What a rank holds while a sharded network grows: its shards, one full parameter, its successor, one equation's workspace."""

from __future__ import annotations

import pytest
import torch
from sharded_networks import Llama, fsdp

import fastmorph as fm
from bench.peak import peak_of

PLAN = [fm.Widen("blocks.*.feed.up", 3072), fm.Deepen("blocks.0.attention.out")]


def grows(optimize):
    torch.manual_seed(0)
    parent = Llama(width=1024, heads=256, hidden=2048, blocks=4)
    fsdp(parent)
    optimizer = torch.optim.SGD(parent.parameters(), 1e-3, momentum=0.9) if optimize else None
    if optimizer is not None:
        for parameter in parent.parameters():
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    kept = []

    def run():
        kept.append(
            fm.distributed.morph(
                parent, PLAN, parallelize=fsdp, optimizer=optimizer, example_inputs=torch.zeros(1, 2, dtype=torch.int64),
                verify=False, memory_budget=0, generator=0,
            )
        )  # fmt: skip

    fm.distributed.morph(parent, [], parallelize=fsdp, verify=False)  # what is imported and compiled at first use is held
    peak = peak_of(run)
    child = kept[0].model
    own = sum(parameter.to_local().nbytes for parameter in child.parameters())
    whole = sum(parameter.nbytes for parameter in child.parameters())
    return peak, own, whole, max(parameter.nbytes for parameter in child.parameters())


@pytest.mark.parametrize("optimize", [False, True])
def test_a_rank_holds_no_more_than_its_shards_and_little_else(two, optimize):
    for peak, own, whole, largest in two.run(grows, optimize):
        if peak is None:
            pytest.skip("this system does not tell a process's peak of memory")
        # A parameter as it comes: gathered, and put in order; its successor; the float64 workspace of the one equation, of
        # matrices a third as large: three of them.
        bound = (1 + optimize) * own + 5 * largest
        assert bound < (1 + optimize) * whole - largest, "more than this would be seen"
        assert peak <= bound, (peak, own, whole, largest)
