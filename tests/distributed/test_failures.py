"""What is refused, and what becomes of all ranks where one fails: an error on each, in bounded time, the parent as it was."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from sharded_networks import PLANS, batch, ddp, fsdp, llama, resnet
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fastmorph as fm
from bench.processes import GROUP_SECONDS, Processes

WIDER = fm.Widen("blocks.0.feed.up", 32)
X, _ = batch(llama)


@dataclass(frozen=True)
class Faulty(fm.Solver):
    """Fails, or ends the process, on rank 1."""

    kills: bool = False

    def solve(self, equation):
        if dist.get_rank() == 1:
            if self.kills:
                os._exit(1)
            raise RuntimeError("out of luck")
        return fm.Direct().solve(equation)

    def choose(self, weight, hidden, frame, *, allow_inexact):
        return fm.Direct().choose(weight, hidden, frame, allow_inexact=allow_inexact)._replace(solver=self)


@dataclass(frozen=True)
class FaultyMorph:
    """A morph that fails on rank 1, behind its first change."""

    layer: str

    @property
    def target(self):
        return self.layer

    def apply(self, transaction):
        weight = transaction.find_layer(self.layer).module.weight
        transaction.replace(weight, weight * 1, linear=None, square=None)
        if dist.get_rank() == 1:
            raise RuntimeError("out of luck")


fm.register_operator(FaultyMorph, name="faulty")


def faulty_shard(model):
    if dist.get_rank() == 1:
        raise RuntimeError("out of luck")
    fsdp(model)


DEEPER = [fm.Deepen(f"blocks.{i}.feed.{name}") for i in (0, 1) for name in ("up", "gate", "down")]


def fails_on_one_rank(place):
    parent = llama()
    fsdp(parent)
    parent(X)
    before = {key: value.full_tensor().clone() for key, value in parent.state_dict().items()}
    plan, options = {
        "operator": ([WIDER, FaultyMorph("head")], {}),
        "equation": (DEEPER, {"solver": Faulty(), "memory_budget": 0}),
        "parallelize": ([WIDER], {"parallelize": faulty_shard}),
    }[place]
    began = time.monotonic()
    with pytest.raises(fm.MorphError if dist.get_rank() == 0 else RuntimeError, match="out of luck") as caught:
        fm.distributed.morph(parent, plan, **{"parallelize": fsdp, "example_inputs": X, **options})
    seconds = time.monotonic() - began
    assert all(torch.equal(value.full_tensor(), before[key]) for key, value in parent.state_dict().items())
    parent(X).sum().backward()
    assert fm.distributed.morph(parent, [WIDER], parallelize=fsdp, example_inputs=X).certificate, "the group goes on"
    return str(caught.value), seconds


@pytest.mark.parametrize("place", ["operator", "equation", "parallelize"])
def test_a_failure_on_one_rank_is_one_on_all(two, place):
    (text, seconds), (_, other) = two.run(fails_on_one_rank, place)
    assert "rank 1 failed, and so all ranks stop: RuntimeError: out of luck" in text
    assert max(seconds, other) < GROUP_SECONDS


def dies():
    parent = llama()
    fsdp(parent)
    fm.distributed.morph(parent, DEEPER, parallelize=fsdp, example_inputs=X, solver=Faulty(kills=True), memory_budget=0)


def test_a_rank_that_dies_ends_the_others_with_the_group_s_error(possible, tmp_path):
    processes = Processes(2, tmp_path)
    processes.send(dies)
    (_, error), (_, gone) = processes.answers()
    processes.stop()
    assert gone == "gone"
    assert "RuntimeError: [" in error, error
    assert "gloo" in error


def wrapped(model):
    """As trainers prepare blocks: recomputed in the backward pass, compiled, sharded."""
    for block in model.blocks:
        block.feed = checkpoint_wrapper(block.feed)
        block.attention.compile(backend="eager")
        fully_shard(block)
    fully_shard(model)


def grows_what_is_wrapped():
    parent = llama()
    wrapped(parent)
    plan = [WIDER, fm.Deepen("head", activation=nn.ELU())]  # an activation that no file names
    grown = fm.distributed.morph(parent, plan, parallelize=wrapped, example_inputs=X, generator=3)
    alone = fm.morph(llama(), plan, example_inputs=X, generator=3).model.state_dict()
    found = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in grown.model.state_dict().items()}
    grown.model(X).sum().backward()
    return found.keys() == alone.keys() and all(torch.equal(found[key].full_tensor(), alone[key]) for key in alone)


def test_blocks_that_are_recomputed_and_compiled(two):
    assert two.run(grows_what_is_wrapped) == [True, True]


def same_without_a_seed():
    parent = llama()
    fsdp(parent)
    torch.manual_seed(dist.get_rank())  # ranks that would draw different seeds
    grown = fm.distributed.morph(parent, PLANS["llama"], parallelize=fsdp, example_inputs=X)
    alone = fm.morph(llama(), grown.history, example_inputs=X)
    wanted = alone.model.state_dict()
    assert not [key for key, value in grown.model.state_dict().items() if not torch.equal(value.full_tensor(), wanted[key])]
    again = fm.distributed.morph(parent, grown.history, parallelize=fsdp, architecture=llama, example_inputs=X)
    assert not [key for key, value in again.model.state_dict().items() if not torch.equal(value.full_tensor(), wanted[key])]
    return fm.history(grown.model) == (grown.history,)


def test_the_first_rank_s_seed_is_everyone_s_and_a_history_replays(two):
    assert two.run(same_without_a_seed) == [True, True]


def refused(case):
    rank = dist.get_rank()
    parent = llama()
    options = {"parallelize": fsdp, "example_inputs": X}
    plan = [WIDER]
    if case == "FSDP1":
        parent = FullyShardedDataParallel(parent, device_id=torch.device("cpu"))
    elif case == "whole child":
        fsdp(parent)
        options["parallelize"] = None
    elif case == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        parent = ddp(parent)
        options["optimizer"] = ZeroRedundancyOptimizer(parent.parameters(), torch.optim.AdamW, lr=1e-2)
    elif case in ("inputs", "shapes", "plan", "seed", "layer", "architecture", "changed"):
        fsdp(parent)
        options |= {
            "inputs": {"example_inputs": None},
            "shapes": {"example_inputs": X[: 2 + rank]},
            "seed": {"generator": rank},
            "architecture": {"architecture": resnet},
            "changed": {"parallelize": lambda model: setattr(model, "head", nn.Linear(3, 3, device="meta"))},
        }.get(case, {})
        plan = {"plan": [fm.Widen("blocks.0.feed.up", 32 + rank)], "layer": [fm.Deepen("nowhere")]}.get(case, plan)
    try:
        fm.distributed.morph(parent, plan, **options)
    except fm.MorphError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("FSDP1", "load it into the model sharded by fully_shard"),
        ("whole child", "give parallelize="),
        ("zero", r"consolidate_state_dict(to=rank)"),
        ("inputs", "needs example_inputs="),
        ("shapes", "the shapes of example_inputs must be the same on all ranks"),
        ("plan", "the plan must be the same on all ranks"),
        ("seed", "must be the same on all ranks: rank 0 has 0, rank 1 has 1"),
        ("layer", "no layer 'nowhere'"),
        ("architecture", "it must build the network that was sharded"),
        ("changed", "parallelize= changed the child: it has a parameter 'head.weight'"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(two, case, words):
    for text in two.run(refused, case):
        assert words in text


def way_around_zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    parent = ddp(llama())
    zero = ZeroRedundancyOptimizer(parent.parameters(), torch.optim.AdamW, lr=1e-2)
    parent(X).square().mean().backward()
    zero.step()
    for rank in range(dist.get_world_size()):
        zero.consolidate_state_dict(to=rank)
        if rank == dist.get_rank():
            state = zero.state_dict()
    plain = torch.optim.AdamW(parent.parameters(), lr=1e-2)
    plain.load_state_dict(state)
    grown = fm.distributed.morph(parent, [WIDER], parallelize=ddp, optimizer=plain, example_inputs=X)
    new = ZeroRedundancyOptimizer(grown.model.parameters(), torch.optim.AdamW, lr=1e-2)
    new.load_state_dict(grown.optimizer.state_dict())
    grown.model(X).square().mean().backward()
    new.step()
    return sum(int(state["step"]) for state in new.optim.state.values())


def test_the_way_around_zero_works(two):
    steps = two.run(way_around_zero)
    assert sum(steps) == 2 * len(list(llama().parameters()))


def in_mixed_precision(way):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    def shard(model):
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"mp_policy": mixed} if way == "mixed" else {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, reshard_after_forward=False, **options)

    parent = llama().float()
    shard(parent)
    grown = fm.distributed.morph(parent, PLANS["llama"], parallelize=shard, example_inputs=X, generator=1)
    alone = fm.morph(llama().float(), PLANS["llama"], example_inputs=X, generator=1).model.state_dict()
    assert not [key for key, value in grown.model.state_dict().items() if not torch.equal(value.full_tensor(), alone[key])]
    grown.model(X).float().sum().backward()
    return str(grown.certificate.dtype), bool(grown.certificate)


@pytest.mark.parametrize(("way", "dtype"), [("mixed", "torch.bfloat16"), ("offload", "torch.float32")])
def test_fsdp_s_policies_are_the_child_s(two, way, dtype):
    assert two.run(in_mixed_precision, way) == [(dtype, True)] * 2
