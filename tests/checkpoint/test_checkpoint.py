"""`save` and `load`: a grown network, its optimizer and its scheduler go on from disk as they stood."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastmorph as fm

pytest.importorskip("safetensors", reason="checkpoints are safetensors files")


def make_parent(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    ).to(dtype)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids)))


def x(dtype=torch.float32):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def steps(model, optimizer, scheduler, count):
    """Losses and learning rates of training, the data seeded by the step."""
    seen = []
    dtype = next(model.parameters()).dtype
    for step in range(count):
        batch = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        seen.append((loss.item(), [group["lr"] for group in optimizer.param_groups]))
    return seen


def grown_twice(make_optimizer, make_scheduler, dtype=torch.float32):
    parent = make_parent(dtype)
    optimizer = make_optimizer(parent.parameters())
    scheduler = make_scheduler(optimizer)
    steps(parent, optimizer, scheduler, 3)
    first = fm.morph(
        parent,
        [fm.Deepen("3", hidden_channels=20, activation="relu")],
        example_inputs=x(dtype),
        optimizer=optimizer,
        generator=1,
    )
    scheduler = first.rebind(scheduler)
    steps(first.model, first.optimizer, scheduler, 2)
    second = fm.morph(
        first.model, [fm.Widen("0", 12)], example_inputs=x(dtype), optimizer=first.optimizer, generator=2, verify="outputs"
    )
    scheduler = second.rebind(scheduler)
    steps(second.model, second.optimizer, scheduler, 2)
    return second, scheduler


def same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("make_optimizer", "make_scheduler"),
    [
        (partial(torch.optim.AdamW, lr=1e-2, amsgrad=True), partial(lr_scheduler.StepLR, step_size=2)),
        (partial(torch.optim.SGD, lr=1e-2, momentum=0.9), partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=40)),
        (partial(torch.optim.RMSprop, lr=1e-3), partial(lr_scheduler.MultiStepLR, milestones=[4, 8])),
    ],
)
@pytest.mark.parametrize("where", ["child.safetensors", "child"])
def test_training_goes_on_from_disk_as_it_would_have(tmp_path, make_optimizer, make_scheduler, where):
    grown, scheduler = grown_twice(make_optimizer, make_scheduler)
    path = tmp_path / where
    fm.save(path, grown.model, optimizer=grown.optimizer, scheduler=scheduler, certificate=grown.certificate, shard_bytes=3000)
    assert len(list(tmp_path.rglob("*.safetensors"))) == (1 if path.suffix else len({*path.glob("model-*")}))
    loaded = fm.load(path, make_parent)
    same_state(grown.model.state_dict(), loaded.model.state_dict())
    assert loaded.certificate == grown.certificate.to_dict()
    assert loaded.plans == fm.history(loaded.model) == fm.history(grown.model)
    assert len(loaded.plans) == 2
    assert loaded.plans[1] == grown.history
    loaded.model.train(grown.model.training)
    expected = steps(grown.model, grown.optimizer, scheduler, 6)
    assert steps(loaded.model, loaded.optimizer, loaded.scheduler, 6) == expected
    same_state(grown.model.state_dict(), loaded.model.state_dict())


def test_a_sharded_checkpoint_keeps_each_file_below_its_bound(tmp_path):
    grown, _ = grown_twice(partial(torch.optim.AdamW, lr=1e-2), lambda optimizer: lr_scheduler.StepLR(optimizer, 5))
    fm.save(tmp_path / "child", grown.model, optimizer=grown.optimizer, shard_bytes=4000)
    index = json.loads((tmp_path / "child" / "model.safetensors.index.json").read_text())
    sizes = {}
    held = dict(grown.model.state_dict())
    for name, file in index["weight_map"].items():
        nbytes = held[name].nbytes if name in held else 0
        sizes[file] = sizes.get(file, 0) + nbytes
    assert len(sizes) > 1
    assert all(size <= 4000 for file, size in sizes.items() if sum(f == file for f in index["weight_map"].values()) > 1)


def test_dtype_ties_and_frozen_parameters_come_back(tmp_path):
    torch.manual_seed(0)
    parent = Tied().to(torch.bfloat16)
    child = fm.deepen(parent, "inner", hidden_channels=16)
    child.embed.weight.requires_grad_(False)
    fm.save(tmp_path / "child.safetensors", child)
    loaded = fm.load(tmp_path / "child.safetensors", Tied).model
    same_state(child.state_dict(), loaded.state_dict())
    assert loaded.head.weight is loaded.embed.weight
    assert not loaded.embed.weight.requires_grad
    assert loaded.inner[0].weight.requires_grad


def test_weights_are_read_by_their_names_by_other_programs(tmp_path):
    from safetensors.torch import load_file

    child = fm.deepen(make_parent(), "0", hidden_channels=40)
    optimizer = torch.optim.Adam(child.parameters())
    child(x()).sum().backward()
    optimizer.step()
    fm.save(tmp_path / "child.safetensors", child, optimizer=optimizer)
    found = load_file(tmp_path / "child.safetensors")
    assert {name for name in found if not name.startswith(".")} == set(child.state_dict())


def test_the_child_knows_its_history_through_copies(tmp_path):
    parent = make_parent()
    assert fm.history(parent) == ()
    grown = fm.morph(parent, [fm.Deepen("0", hidden_channels=40)], generator=3)
    copied = copy.deepcopy(grown.model)
    again = fm.morph(copied, [fm.GrowKernel("3", 5)], generator=4)
    assert fm.history(again.model) == (grown.history, again.history)
    built = parent
    for plan in fm.history(again.model):
        built = fm.morph(built, plan).model
    same_state(again.model.state_dict(), built.state_dict())
    assert fm.history(parent) == ()


def test_a_history_that_no_file_holds_is_told_when_it_is_asked_for(tmp_path):
    child = fm.deepen(make_parent(), "0", hidden_channels=40, activation=nn.Softplus(beta=2.0))
    with pytest.raises(fm.MorphError, match="history of this model cannot be told"):
        fm.save(tmp_path / "child.safetensors", child)
    assert not list(tmp_path.iterdir())


def test_plans_add_up():
    first = fm.Plan([fm.Deepen("0", hidden_channels=40)], seed=1, inputs=[((4, 3, 6, 6), "float32")])
    second = fm.Plan([fm.Widen("3", 8)], seed=2)
    both = first + second
    assert both.operators == first.operators + second.operators
    assert both.inputs == first.inputs
    assert both.seed is None
    assert (first + first).seed == 1
    shapes = [
        {name: tensor.shape for name, tensor in fm.restructure(make_parent(), plan).state_dict().items()} for plan in [both]
    ]
    by_steps = fm.restructure(fm.restructure(make_parent(), first), second, example_inputs=x())
    assert shapes[0] == {name: tensor.shape for name, tensor in by_steps.state_dict().items()}
    with pytest.raises(TypeError):
        first + "Widen"


def test_an_optimizer_of_ones_own_needs_its_maker(tmp_path):
    class Own(torch.optim.SGD):
        pass

    child = fm.deepen(make_parent(), "0", hidden_channels=40)
    optimizer = Own(child.parameters(), lr=0.1, momentum=0.5)
    steps(child, optimizer, None, 2)
    path = tmp_path / "child.safetensors"
    fm.save(path, child, optimizer=optimizer)
    with pytest.raises(fm.MorphError, match="not PyTorch's own"):
        fm.load(path, make_parent)
    loaded = fm.load(path, make_parent, optimizer=Own)
    loaded.model.train()
    assert steps(loaded.model, loaded.optimizer, None, 3) == steps(child, optimizer, None, 3)


def test_a_scheduler_with_parts_inside_needs_its_maker(tmp_path):
    def chained(optimizer):
        parts = [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 10)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])

    child = fm.deepen(make_parent(), "0", hidden_channels=40)
    optimizer = torch.optim.Adam(child.parameters(), lr=1e-2)
    scheduler = chained(optimizer)
    steps(child, optimizer, scheduler, 4)
    path = tmp_path / "child.safetensors"
    fm.save(path, child, optimizer=optimizer, scheduler=scheduler)
    with pytest.raises(fm.MorphError, match="scheduler="):
        fm.load(path, make_parent)
    loaded = fm.load(path, make_parent, scheduler=chained)
    loaded.model.train()
    assert steps(loaded.model, loaded.optimizer, loaded.scheduler, 6) == steps(child, optimizer, scheduler, 6)


def test_what_does_not_fit_is_refused(tmp_path):
    child = fm.deepen(make_parent(), "0", hidden_channels=40)
    path = tmp_path / "child.safetensors"
    with pytest.raises(fm.MorphError, match="parameters that are not the model's"):
        fm.save(path, child, optimizer=torch.optim.SGD(make_parent().parameters()))
    with pytest.raises(fm.MorphError, match="give optimizer= too"):
        fm.save(path, child, scheduler=object())
    fm.save(path, child)
    with pytest.raises(fm.MorphError, match=r"does not fit the network: .*The factory must build"):
        fm.load(path, lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(fm.MorphError, match=r"not written by fastmorph\.save, or is not whole"):
        fm.load(path, make_parent)
    with pytest.raises(FileNotFoundError):
        fm.load(tmp_path / "nowhere.safetensors", make_parent)


def test_growth_in_place_keeps_the_object(tmp_path):
    parent = make_parent().eval()
    before, expected = parent, parent(x()).detach()
    grown = fm.morph_(parent, [fm.Deepen("0", hidden_channels=40), fm.Widen("3", 6)], example_inputs=x(), generator=1)
    assert grown.model is before
    error = (before(x()) - expected).abs().max() / expected.abs().max()
    assert error <= grown.certificate.tolerance
    assert before[3].out_channels == 6
    with pytest.raises(fm.MorphError, match="cannot be replaced in place"):
        fm.morph_(nn.Linear(3, 4), fm.Deepen("", hidden_channels=20))
