"""Networks that grow while they learn, in the hands of libraries for continual learning: their optimizers come along."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators

pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def importing():
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def moments(optimizer, parameter):
    return optimizer.state[parameter]["exp_avg"]


def test_deep_river_learns_on_with_the_moments_it_would_forget():
    with importing():
        pytest.importorskip("deep_river", reason="deep-river is not installed (requirements-others.txt)")
        from deep_river.classification import Classifier
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    learner = Classifier(net, loss_fn="cross_entropy", optimizer_fn="adam", lr=1e-2, is_class_incremental=True)
    stream = [({"a": float(i % 3), "b": i / 7, "c": 1.0}, i % 2) for i in range(6)]
    for x, y in stream:
        learner.learn_one(x, y)
    before = dict(learner.module.named_parameters())
    optimizer = learner.optimizer
    first, step = moments(optimizer, before["0.weight"]).clone(), int(optimizer.state[before["0.weight"]]["step"])
    assert first.any()

    learner._update_observed_targets(2)  # a third class: deep-river enlarges the head, and makes its optimizer anew
    assert learner.module[2].out_features == 3
    assert learner.optimizer is not optimizer
    assert not learner.optimizer.state
    with pytest.warns(fm.FreshStateWarning, match=r"2\.weight"):
        learner.optimizer = fm.transfer_optimizer(optimizer, learner.module, before)
    assert torch.equal(moments(learner.optimizer, learner.module[0].weight), first)
    learner.learn_one(stream[0][0], 2)
    assert learner.optimizer.state[learner.module[0].weight]["step"] == step + 1

    x = torch.randn(4, 3)
    expected = learner.module(x)
    grown = fm.morph(learner.module, fm.Widen("0", 12), example_inputs=x, optimizer=learner.optimizer)
    learner.module, learner.optimizer = grown.model, grown.optimizer
    assert torch.allclose(learner.module(x), expected, atol=1e-6)
    learner.learn_one(*stream[1])
    assert learner.optimizer.state[learner.module[0].weight]["step"] == step + 2


def test_an_avalanche_classifier_takes_new_classes_and_grows_between_experiences():
    with importing():
        pytest.importorskip("avalanche.models", reason="avalanche-lib is not installed (requirements-others.txt)")
        from avalanche.benchmarks import tensors_benchmark
        from avalanche.models import IncrementalClassifier
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import Naive

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
            self.head = IncrementalClassifier(6, masking=False)

        def forward(self, x):
            return self.head(self.features(x))

    torch.manual_seed(0)
    data = [(torch.randn(12, 5), torch.arange(12) % 2 + 2 * task) for task in range(3)]
    experiences = tensors_benchmark(data, data, task_labels=[0, 0, 0]).train_stream
    net = Net()
    strategy = Naive(
        model=net, optimizer=torch.optim.Adam(net.parameters(), lr=1e-2), criterion=nn.CrossEntropyLoss(),
        train_mb_size=6, train_epochs=2, evaluator=EvaluationPlugin(),
    )  # fmt: skip
    strategy.train(experiences[0], num_workers=0)
    assert strategy.optimizer.state[net.features[0].weight]["step"] == 4

    x = data[0][0]
    expected = strategy.model(x)
    plan = fm.Plan([fm.Widen("features.0", 12), fm.Deepen("features.2", activation="relu")])
    grown = fm.morph(strategy.model, plan, example_inputs=x, optimizer=strategy.optimizer)
    assert torch.allclose(grown.model(x), expected, atol=1e-6)
    strategy.model, strategy.optimizer = grown.model, grown.optimizer
    strategy.train(experiences[1], num_workers=0)  # classes 2 and 3: the head grows by Avalanche's own hand
    assert strategy.model.head.classifier.out_features == 4
    assert strategy.optimizer.state[strategy.model.features[0].weight]["step"] == 8

    before = dict(strategy.model.named_parameters())
    optimizer, kept = strategy.optimizer, moments(strategy.optimizer, before["features.0.weight"]).clone()
    strategy.model.head.adaptation(experiences[2])
    with pytest.warns(fm.FreshStateWarning, match=r"head\.classifier\.weight"):
        moved = fm.transfer_optimizer(optimizer, strategy.model, before)
    assert torch.equal(moments(moved, strategy.model.features[0].weight), kept)
    assert any(strategy.model.head.classifier.weight is p for group in moved.param_groups for p in group["params"])
