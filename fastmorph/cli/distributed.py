"""The commands about sharded networks: checkpoints of torch.distributed.checkpoint, and the model of cost."""

from __future__ import annotations

import argparse

from fastmorph.cli.child import print_table
from fastmorph.cli.networks import make_network


def grow(source: argparse.Namespace, inputs: object) -> int:
    """Grow a DCP directory into another one."""
    import torch

    from fastmorph.distributed import grow_checkpoint
    from fastmorph.plan.plan import Plan

    plan = Plan.load(source.plan)
    seed = 0 if source.seed is None and plan.seed is None else source.seed
    history = grow_checkpoint(
        source.source,
        source.out,
        lambda: make_network(source.model),
        plan,
        example_inputs=inputs,
        generator=seed,
        memory_budget=int(source.memory_budget * 2**20),
    )
    print(f"{source.out} holds the child, what else was in {source.source}, and the plan that made it:\n")
    print(history.to_toml())
    print(f"Solved with {torch.get_num_threads()} threads. Parent and child were not run: compare them with fastmorph.verify.")
    return 0


def plan_cost(given: argparse.Namespace) -> int:
    """Print the model of cost, and what it assumes."""
    from fastmorph.distributed import cost

    machine = cost.Machine(
        ranks=given.world_size,
        bandwidth=given.bandwidth * 1e9,
        memory_bandwidth=given.memory_bandwidth * 1e9,
        flops=given.flops * 1e12,
        launch=given.launch * 1e-6,
        latency=given.latency * 1e-6,
        itemsize=given.itemsize,
        trained=not given.no_optimizer,
    )
    print_table(cost.table(machine, given.factor))
    moments = ", moments 4" if machine.trained else "; there is no optimizer"
    print(
        f"\nThis is a model, not a measurement: of {machine.ranks} ranks that each receive {given.bandwidth:g} GB/s from the "
        f"others, read and write\n{given.memory_bandwidth:g} GB/s of their own memory, do {given.flops:g} TFLOP/s, launch an "
        f"operator in {given.launch:g} us and take {given.latency:g} us times log2(ranks)\nfor a collective of a few bytes. "
        f"Weights have {machine.itemsize} bytes{moments}. Nothing overlaps. Not counted are the certificate, two forwards,\n"
        "and the following of the network on fake tensors, seconds on every rank. Counted is this:\n"
    )
    print((cost.__doc__ or "").split("\n\n")[-1].strip())
    return 0
