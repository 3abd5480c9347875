"""fastmorph: grow a trained PyTorch network without changing what it computes."""

from fastmorph import graph, nn
from fastmorph.certify.certificate import Certificate
from fastmorph.certify.verify import verify
from fastmorph.equation.alternate import alternate
from fastmorph.equation.bounds import tolerance
from fastmorph.equation.decompose import compose, decompose
from fastmorph.equation.decomposition import Decomposition, InexactMorphError
from fastmorph.equation.many import decompose_many
from fastmorph.equation.problem import Problem
from fastmorph.equation.sequence import Chain, Sum, decompose_sequence, decompose_sum
from fastmorph.equation.solvers import Auto, Direct, General, Practical, Solver
from fastmorph.errors import MorphError
from fastmorph.graph import Coupled, coupled
from fastmorph.morphs.deepen import Deepen
from fastmorph.morphs.grow_kernel import GrowKernel
from fastmorph.morphs.insert_subnet import InsertSubnet
from fastmorph.morphs.operators import deepen, grow_kernel, insert_subnet, widen
from fastmorph.morphs.subnet import LayerSpec, Residual, Sequential, Skip, Stacked
from fastmorph.morphs.widen import Widen
from fastmorph.plan.layer_types import register_layer
from fastmorph.plan.morph import Morphed, morph, restructure
from fastmorph.plan.optimizer_rules import FreshStateWarning, optimizer_rule
from fastmorph.plan.plan import Plan
from fastmorph.plan.transfer import transfer_optimizer

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Certificate",
    "Chain",
    "Coupled",
    "Decomposition",
    "Deepen",
    "Direct",
    "FreshStateWarning",
    "General",
    "GrowKernel",
    "InexactMorphError",
    "InsertSubnet",
    "LayerSpec",
    "MorphError",
    "Morphed",
    "Plan",
    "Practical",
    "Problem",
    "Residual",
    "Sequential",
    "Skip",
    "Solver",
    "Stacked",
    "Sum",
    "Widen",
    "alternate",
    "compose",
    "coupled",
    "decompose",
    "decompose_many",
    "decompose_sequence",
    "decompose_sum",
    "deepen",
    "graph",
    "grow_kernel",
    "insert_subnet",
    "morph",
    "nn",
    "optimizer_rule",
    "register_layer",
    "restructure",
    "tolerance",
    "transfer_optimizer",
    "verify",
    "widen",
]
