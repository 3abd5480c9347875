"""A morph of your own, as data: it works in plans, files and histories, and the optimizer follows.

`Equalise` gives the channels between two linear layers one size, by powers of two that the layer behind takes back: exact for
every activation with f(c x) = c f(x), c > 0, such as ReLU (cross-layer equalisation, Nagel et al. 2019).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastmorph as fm


@dataclass(frozen=True)
class Equalise:
    """Scale the rows of `maker` and, inversely, the columns of `reader`."""

    maker: str
    reader: str

    @property
    def target(self) -> str:
        return self.maker

    def apply(self, transaction: fm.Transaction) -> None:
        maker, reader = (transaction.find_layer(name).module for name in (self.maker, self.reader))
        sizes = maker.weight.detach().norm(dim=1) if transaction.with_weights else torch.ones(maker.out_features)
        scale = torch.exp2((sizes.mean() / sizes).log2().round())  # powers of two: nothing is rounded

        def along(tensor: Tensor, factor: Tensor, dim: int) -> None:
            factor = factor.view([-1 if other == dim else 1 for other in range(tensor.ndim)]).to(tensor)
            # Gradients change inversely to the weights, and so do an optimizer's averages of them.
            new = factor * tensor.detach()
            transaction.replace(tensor, new, linear=lambda m: m / factor, square=lambda m: m / factor**2)

        along(maker.weight, scale, 0)
        if maker.bias is not None:
            along(maker.bias, scale, 0)
        along(reader.weight, 1 / scale, 1)


fm.register_operator(Equalise, name="example.equalise")

torch.manual_seed(0)
parent = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
with torch.no_grad():
    parent[0].weight.mul_(torch.logspace(-3, 3, 32)[:, None])
plan = fm.Plan([Equalise("0", "2"), fm.Widen("0", 48)])
grown = fm.morph(parent, plan, example_inputs=torch.randn(16, 8))
sizes = grown.model.get_parameter("0.weight")[:32].detach().norm(dim=1)
print(grown.history.to_toml())
print(f"rows differed by a factor of {1e6:.0e}, now by {float(sizes.max() / sizes.min()):.1f}\n{grown.certificate.verdict}")
