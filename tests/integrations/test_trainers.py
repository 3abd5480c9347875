"""Growth between two stretches of training with other people's loops: nothing of ours is needed but `morph` and `rebind`."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(1))
PLAN = fm.Plan([fm.Deepen("0", hidden_channels=36, activation="relu"), fm.Widen("2", 12)], seed=5)


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def steps(net, optimizer, count, backward=torch.Tensor.backward):
    losses = []
    for _ in range(count):
        loss = nn.functional.cross_entropy(net(X), Y)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def by_hand(make_optimizer, before, after):
    """The losses of a plain loop that grows in between."""
    net = make_net()
    optimizer = make_optimizer(net.parameters())
    losses = steps(net, optimizer, before)
    grown = fm.morph(net, PLAN, example_inputs=X, optimizer=optimizer)
    return losses + steps(grown.model, grown.optimizer, after)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_a_compiled_network_grows_by_its_original():
    net = make_net()
    optimizer = adamw(net.parameters())
    compiled = torch.compile(net, backend="eager")
    losses = steps(compiled, optimizer, 2)
    with pytest.raises(fm.MorphError, match="morph the original model, then compile the child"):
        fm.morph(compiled, PLAN, example_inputs=X)
    grown = fm.morph(net, PLAN, example_inputs=X, optimizer=optimizer)
    losses += steps(torch.compile(grown.model, backend="eager"), grown.optimizer, 2)
    assert losses == pytest.approx(by_hand(adamw, 2, 2), rel=1e-5)


def test_mixed_precision_with_a_scaler_goes_on():
    net = make_net()
    optimizer = adamw(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)

    def run(net, optimizer, count):
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(net(X), Y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return loss.item()

    last = run(net, optimizer, 3)
    grown = fm.morph(net, PLAN, example_inputs=X, optimizer=optimizer)
    first = run(grown.model, grown.optimizer, 1)
    assert first < last  # training went on where it was
    assert scaler.get_scale() == 2.0**6  # as after four steps without a pause
    assert grown.optimizer.state[grown.model[5].bias]["step"] == 4


@pytest.mark.skipif(not find_spec("accelerate"), reason="accelerate is not installed (requirements-zoo.txt)")
@pytest.mark.filterwarnings("ignore")
def test_accelerate_grows_the_unwrapped_and_prepares_again():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = make_net()
    net, optimizer = accelerator.prepare(net, adamw(net.parameters()))
    losses = steps(net, optimizer, 2, accelerator.backward)
    grown = fm.morph(accelerator.unwrap_model(net), PLAN, example_inputs=X, optimizer=optimizer.optimizer)
    accelerator.free_memory()
    net, optimizer = accelerator.prepare(grown.model, grown.optimizer)
    losses += steps(net, optimizer, 2, accelerator.backward)
    assert losses == by_hand(adamw, 2, 2)
    with pytest.raises(fm.MorphError, match="wraps another optimizer"):
        fm.morph(accelerator.unwrap_model(net), PLAN, example_inputs=X, optimizer=optimizer)


@pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed (requirements-zoo.txt)")
@pytest.mark.filterwarnings("ignore")
def test_timm_s_average_grows_by_the_same_history():
    declare_torchvision_operators()
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    net = make_net()
    optimizer = create_optimizer_v2(net, opt="lamb", lr=1e-2, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    average = ModelEmaV3(net, decay=0.5)
    for epoch in range(3):
        steps(net, optimizer, 1)
        average.update(net)
        scheduler.step(epoch)
    before = average.module.eval()(X)
    grown = fm.morph(net, PLAN, example_inputs=X, optimizer=optimizer)
    scheduler = grown.rebind(scheduler)
    average.module = fm.morph(average.module, grown.history).model  # the same noise: the two may go on being averaged
    error = (average.module.eval()(X) - before).abs().max() / before.abs().max()
    assert error <= fm.verify(net, grown.model, X).tolerance
    for epoch in range(3, 6):
        steps(grown.model, grown.optimizer, 1)
        average.update(grown.model)
        scheduler.step(epoch)
    rates = {group["lr"] for group in grown.optimizer.param_groups}
    assert rates == {scheduler._get_lr(5)[0]}
    for ours, theirs in zip(average.module.parameters(), grown.model.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 0.1  # three steps at such rates


class Examples(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "labels": Y[index]}


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("accelerate")), reason="transformers or accelerate is not installed"
)
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_goes_on_in_segments(tmp_path):
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Trainer, TrainingArguments

    def arguments(steps):
        return TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=12, use_cpu=True, report_to=[], save_strategy="no",
            learning_rate=1e-2, lr_scheduler_type="constant_with_warmup", warmup_steps=2, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip

    first = Trainer(WithLoss(), arguments(3), train_dataset=Examples())
    first.train()
    plan = fm.Plan([fm.Deepen("net.0", hidden_channels=36, activation="relu"), fm.Widen("net.2", 12)], seed=5)
    grown = fm.morph(first.model, plan, example_inputs={"x": X[:2]}, optimizer=first.optimizer.optimizer)
    scheduler = grown.rebind(first.lr_scheduler)
    assert {group["lr"] for group in grown.optimizer.param_groups} == {1e-2}  # warm, not from the start again
    second = Trainer(grown.model, arguments(3), train_dataset=Examples(), optimizers=(grown.optimizer, scheduler))
    second.train()
    losses = [entry["loss"] for entry in (*first.state.log_history, *second.state.log_history) if "loss" in entry]
    assert len(losses) == 6
    assert losses[3] < losses[2]  # no jump at birth: it has learnt on
    assert grown.optimizer.state[grown.model.net[5].bias]["step"] == 6


@pytest.mark.skipif(not find_spec("skorch"), reason="skorch is not installed (requirements-zoo.txt)")
@pytest.mark.filterwarnings("ignore")
def test_skorch_goes_on_by_partial_fit():
    from skorch import NeuralNetClassifier

    net = NeuralNetClassifier(
        make_net(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=1e-2, max_epochs=2, batch_size=12,
        train_split=None, verbose=0, iterator_train__shuffle=False,
    )  # fmt: skip
    net.fit(X.numpy(), Y.numpy())
    grown = fm.morph(net.module_, PLAN, example_inputs=X, optimizer=net.optimizer_)
    net.module_, net.optimizer_ = grown.model, grown.optimizer
    net.partial_fit(X.numpy(), Y.numpy())
    assert net.history[:, "train_loss"] == pytest.approx(by_hand(adamw, 2, 2), rel=1e-6)
    assert net.optimizer_ is grown.optimizer
