"""Growth of networks that are sharded over many processes by PyTorch's own engine: FSDP2, tensor parallel, both, DDP.

    import fastmorph as fm

    grown = fm.distributed.morph(model, plan, parallelize=shard, optimizer=optimizer, example_inputs=batch)
    model, optimizer = grown.model, grown.optimizer

Every rank calls it, and `shard` is the function by which the model was sharded: it is called with the child's architecture.
"""

from fastmorph.distributed.checkpoint import checkpoint_plans, grow_checkpoint
from fastmorph.distributed.morph import morph

__all__ = ["checkpoint_plans", "grow_checkpoint", "morph"]
