"""How far a child is from its parent."""

from __future__ import annotations

from torch import nn

import fastmorph as fm
from bench.networks.models import Network

TOLERANCE = 1e-4  # of float32 outputs, the largest difference over the largest value; see `fastmorph.verify`


def difference(network: Network, child: nn.Module) -> float:
    """The largest relative difference between the outputs of a network and of its child, all of whose layers are widened."""
    for operator in network.plan:
        assert len(child.get_submodule(operator.layer).weight) == operator.channels, f"{operator.layer} is not widened"
    return difference_of_outputs(network, child)


def difference_of_outputs(network: Network, child: nn.Module) -> float:
    """The same for any child."""
    certificate = fm.verify(network.model, child, network.inputs, exact=False)
    assert certificate, str(certificate)
    return certificate.max_rel
