"""fastmorph: grow a trained PyTorch network without changing what it computes."""

from fastmorph import nn
from fastmorph.bounds import tolerance
from fastmorph.certificate import Certificate
from fastmorph.decomposition import Decomposition
from fastmorph.deepen import Deepen
from fastmorph.equation import compose, decompose
from fastmorph.errors import InexactMorphError, MorphError
from fastmorph.graph import Coupled, coupled
from fastmorph.grow_kernel import GrowKernel
from fastmorph.insert_subnet import InsertSubnet
from fastmorph.many import decompose_many
from fastmorph.morph import Morphed, morph, restructure
from fastmorph.operators import deepen, grow_kernel, insert_subnet, widen
from fastmorph.plan import Plan
from fastmorph.problem import Problem
from fastmorph.sequence import Chain, Sum, decompose_sequence, decompose_sum
from fastmorph.solvers import Auto, Direct, General, Practical
from fastmorph.subnet import LayerSpec, Residual, Sequential, Skip, Stacked
from fastmorph.verify import verify
from fastmorph.widen import Widen

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Certificate",
    "Chain",
    "Coupled",
    "Decomposition",
    "Deepen",
    "Direct",
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
    "Stacked",
    "Sum",
    "Widen",
    "compose",
    "coupled",
    "decompose",
    "decompose_many",
    "decompose_sequence",
    "decompose_sum",
    "deepen",
    "grow_kernel",
    "insert_subnet",
    "morph",
    "nn",
    "restructure",
    "tolerance",
    "verify",
    "widen",
]
