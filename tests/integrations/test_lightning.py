"""Growth in mid-training with Lightning: it goes on, its checkpoints load and resume."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators

declare_torchvision_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    from fastmorph.integrations.lightning import Grow, GrowingModule

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of loggers, workers, and deprecations of its own
for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(1))
PLAN = fm.Plan([fm.Deepen("0", hidden_channels=36, activation="relu"), fm.Widen("2", 12)], seed=5)


class Classifier(GrowingModule, pl.LightningModule):
    def __init__(self, stall: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
        self.stall, self.births = stall, []

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", torch.tensor(1.0) if self.stall else nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]


def fit(folder, model, epochs, callbacks=(), ckpt_path=None):
    keep = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor=None)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[keep, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = DataLoader(TensorDataset(X, Y), batch_size=8)
    trainer.fit(model, data, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_a_network_grows_in_mid_training_and_resumes_bit_for_bit(tmp_path):
    grow = Grow(PLAN, epoch=2, example_inputs=X[:2])
    whole = Classifier()
    trainer = fit(tmp_path, whole, 5, [grow])
    assert grow.certificate
    assert len(fm.history(whole.net)) == 1
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [7, 1]  # the activation's a does not decay
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([1e-2 * 0.9**5] * 2)

    for last in (1, 3):  # before and after the growth
        resumed = Classifier()
        fit(tmp_path / "again", resumed, 5, [Grow(PLAN, epoch=2, example_inputs=X[:2])], tmp_path / f"epoch={last}.ckpt")
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name

    loaded = Classifier.load_from_checkpoint(tmp_path / "epoch=4.ckpt", weights_only=True)
    assert torch.equal(loaded.net.eval()(X), whole.net.eval()(X))


def test_it_grows_when_a_metric_stalls(tmp_path):
    model = Classifier(stall=True)
    grow = Grow(fm.Widen("0", 10), monitor="loss", patience=2, example_inputs=X[:2])
    fit(tmp_path, model, 3, [grow])
    assert model.net[0].out_channels == 8  # the first validation sets the mark, two more do not better it
    fit(tmp_path, model, 4, [grow])
    assert model.net[0].out_channels == 10


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(fm.MorphError, match="an epoch or a monitor"):
        Grow(PLAN)
    with pytest.raises(fm.MorphError, match="no metric 'nothing' was logged"):
        fit(tmp_path, Classifier(), 2, [Grow(PLAN, monitor="nothing")])
    grown = Classifier()
    grown.net = fm.widen(grown.net, {"0": 10}, example_inputs=X[:2])
    fit(tmp_path, Classifier(), 1, [Grow(PLAN, epoch=0, example_inputs=X[:2])])
    with pytest.raises(fm.MorphError, match="grown in another way"):
        fit(tmp_path, grown, 2, ckpt_path=tmp_path / "epoch=0.ckpt")
