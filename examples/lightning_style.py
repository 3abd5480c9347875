"""Growth inside a module that owns its network and its optimizers, as PyTorch Lightning's modules do; it needs no Lightning.

`Trainer` stands for the framework: it calls the hooks, and after `on_train_epoch_end` it drives what
`configure_optimizers` returns.
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss

import fastmorph as fm


class Regression(nn.Module):
    """A module with the hooks that a trainer calls."""

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.98)

    def configure_optimizers(self):
        return self.optimizer, self.scheduler

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        return mse_loss(self.network(inputs), targets)

    def on_train_epoch_end(self, epoch: int) -> None:
        if epoch % 2:  # every other epoch the hidden layer gets eight units more
            width = self.network.get_submodule("0").out_features
            plan = [fm.Widen("0", width + 8)]
            grown = fm.morph(self.network, plan, example_inputs=torch.randn(2, 6), optimizer=self.optimizer, generator=epoch)
            self.network, self.optimizer = grown.model, grown.optimizer
            self.scheduler = grown.rebind(self.scheduler)


class Trainer:
    """What the framework does."""

    def fit(self, module: Regression, data: list[tuple[torch.Tensor, torch.Tensor]], epochs: int) -> list[float]:
        losses = []
        for epoch in range(epochs):
            optimizer, scheduler = module.configure_optimizers()
            for batch in data:
                optimizer.zero_grad()
                loss = module.training_step(batch)
                loss.backward()
                optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            module.on_train_epoch_end(epoch)
        return losses


torch.manual_seed(0)
inputs = torch.randn(20, 32, 6)
data = [(x, (x.square().sum(1, keepdim=True) - 6) / 4) for x in inputs]
module = Regression()
losses = Trainer().fit(module, data, epochs=6)
print("losses:", ", ".join(f"{loss:.3f}" for loss in losses), "- hidden units:", module.network.get_submodule("0").out_features)
assert losses[-1] < losses[0]
