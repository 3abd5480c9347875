"""fastmorph: grow a trained PyTorch network without changing what it computes."""

import importlib
from typing import Any

from fastmorph import graph, nn
from fastmorph.certify.certificate import Certificate
from fastmorph.certify.verify import verify
from fastmorph.checkpoint.load import Loaded, load
from fastmorph.checkpoint.save import save
from fastmorph.equation.alternate import alternate
from fastmorph.equation.bounds import tolerance
from fastmorph.equation.decompose import compose, decompose
from fastmorph.equation.decomposition import Decomposition, InexactMorphError
from fastmorph.equation.many import decompose_many
from fastmorph.equation.problem import Problem
from fastmorph.equation.sequence import Chain, Sum, decompose_sequence, decompose_sum
from fastmorph.equation.solvers import Auto, Direct, General, Practical, Solver
from fastmorph.errors import MorphError
from fastmorph.graph import Coupled, Structure, coupled, follow
from fastmorph.morphs.add_experts import AddExperts, add_experts
from fastmorph.morphs.add_heads import AddHeads, add_heads
from fastmorph.morphs.candidates import Candidate, Candidates, candidates
from fastmorph.morphs.deepen import Deepen, deepen
from fastmorph.morphs.grow_kernel import GrowKernel, grow_kernel
from fastmorph.morphs.grow_vocabulary import GrowVocabulary, grow_vocabulary
from fastmorph.morphs.insert_block import InsertBlock, insert_block
from fastmorph.morphs.insert_subnet import InsertSubnet, insert_subnet
from fastmorph.morphs.subnet import LayerSpec, Residual, Sequential, Skip, Stacked
from fastmorph.morphs.widen import Widen, widen
from fastmorph.plan.history import history
from fastmorph.plan.layer_types import register_layer
from fastmorph.plan.morph import Morphed, Options, morph, morph_, restructure
from fastmorph.plan.operators import register_operator, register_part
from fastmorph.plan.optimizer_rules import FreshStateWarning, optimizer_rule
from fastmorph.plan.plan import Plan
from fastmorph.plan.step import Step
from fastmorph.plan.transaction import Operator, Transaction
from fastmorph.plan.transfer import transfer_optimizer

__version__ = "0.1.0"

__all__ = [
    "AddExperts",
    "AddHeads",
    "Auto",
    "Candidate",
    "Candidates",
    "Certificate",
    "Chain",
    "Coupled",
    "Decomposition",
    "Deepen",
    "Direct",
    "FreshStateWarning",
    "General",
    "GrowKernel",
    "GrowVocabulary",
    "InexactMorphError",
    "InsertBlock",
    "InsertSubnet",
    "LayerSpec",
    "Loaded",
    "MorphError",
    "Morphed",
    "Operator",
    "Options",
    "Plan",
    "Practical",
    "Problem",
    "Residual",
    "Sequential",
    "Skip",
    "Solver",
    "Stacked",
    "Step",
    "Structure",
    "Sum",
    "Transaction",
    "Widen",
    "add_experts",
    "add_heads",
    "alternate",
    "candidates",
    "compose",
    "coupled",
    "decompose",
    "decompose_many",
    "decompose_sequence",
    "decompose_sum",
    "deepen",
    "follow",
    "graph",
    "grow_kernel",
    "grow_vocabulary",
    "history",
    "insert_block",
    "insert_subnet",
    "load",
    "morph",
    "morph_",
    "nn",
    "optimizer_rule",
    "register_layer",
    "register_operator",
    "register_part",
    "restructure",
    "save",
    "tolerance",
    "transfer_optimizer",
    "verify",
    "widen",
]


def __getattr__(name: str) -> Any:
    """Rooms that are imported when they are used: PyTorch's engine takes its time."""
    if name in ("distributed", "transformers"):
        return importlib.import_module(f"fastmorph.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
