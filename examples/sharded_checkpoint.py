"""Save, grow, load, go on: a trainer that keeps its checkpoints by torch.distributed.checkpoint, as torchtitan does.

    python examples/sharded_checkpoint.py                       # one rank
    torchrun --nproc-per-node 2 examples/sharded_checkpoint.py  # two

The checkpoint grows on one process, tensor by tensor; on the command line that is
`fastmorph grow SRC OUT --model my.module:network --plan plan.toml`. Whoever loads it, on any number of ranks, builds the first
network and follows the plans that travel with the checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastmorph as fm


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4))


def sharded(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    fully_shard(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    torch.manual_seed(dist.get_rank())
    loss = torch.tensor(torch.nan)
    for _ in range(steps):
        x = torch.randn(64, 8)
        loss = nn.functional.mse_loss(model(x), x[:, :4].sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model, optimizer = sharded(network())
    print(f"loss {train(model, optimizer, 30):.4f}")
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": 30}, checkpoint_id=folder / "30")

    if dist.get_rank() == 0:  # or later, elsewhere, without any group
        plan = [fm.Widen("0", 48), fm.Deepen("2", activation="silu")]
        fm.distributed.grow_checkpoint(folder / "30", folder / "30-grown", network, plan, generator=0)
    dist.barrier()

    grown = network()
    for plan in fm.distributed.checkpoint_plans(folder / "30-grown"):
        grown = fm.restructure(grown, plan)
    model, optimizer = sharded(grown)
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(loaded, checkpoint_id=folder / "30-grown")
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    print(f"step {loaded['step']}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"loss {train(model, optimizer, 30):.4f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        alone = "RANK" not in os.environ
        where = f"file://{own}/store" if alone else "env://"
        dist.init_process_group("gloo", init_method=where, **({"rank": 0, "world_size": 1} if alone else {}))
        folder: list[str] = [own]
        dist.broadcast_object_list(folder)  # the first rank's
        main(Path(folder[0]))
        dist.barrier()
        dist.destroy_process_group()
