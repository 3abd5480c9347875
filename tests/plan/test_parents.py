"""Parents that are wrapped, sharded or compiled, contexts of the caller, and children that their class could not load."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

import fastmorph as fm
from bench.zoo.models import declare_torchvision_operators


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


X = torch.randn(2, 3, 9, 9)
OPERATORS = [
    fm.Deepen("0", activation="relu", norm="batch"),
    fm.Widen("0", 12),
    fm.GrowKernel("0", 5),
    fm.InsertSubnet("3", fm.Residual(4)),
]


@pytest.fixture
def group(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def inside(model):
    return nn.Sequential(model, nn.Identity())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("place", [lambda model: model, inside])
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda model, mesh: DistributedDataParallel(model), "morph its .module on each process"),
        (lambda model, mesh: FullyShardedDataParallel(model, device_id=torch.device("cpu")), "sharded by FSDP, so"),
        (lambda model, mesh: fully_shard(model, mesh=mesh), "sharded by FSDP2"),
        (lambda model, mesh: distribute_module(model, mesh), "is a DTensor, distributed over a mesh"),
        (lambda model, mesh: torch.jit.script(model), "is TorchScript"),
        (lambda model, mesh: torch.jit.trace(model, X), "is TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_morphed_is_refused_with_the_way_around(wrap, words, place, operator, group):
    model = place(wrap(network(), group))
    for run in (fm.morph, fm.restructure):
        with pytest.raises(fm.MorphError) as caught:
            run(model, operator, example_inputs=X)
        assert words in str(caught.value)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_inside_data_parallel_is_morphed(operator):
    values = {**vars(operator), "layer": f"module.{operator.layer}"}
    grown = fm.morph(DataParallel(network()), type(operator)(**values), example_inputs=X)
    assert grown.certificate


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "the meta device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("inputs", [None, X])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_the_caller_change_nothing(context, operator, inputs):
    parent = network()
    expected = fm.morph(parent, operator, example_inputs=inputs, generator=1)
    with CONTEXTS[context]():
        grown = fm.morph(parent, operator, example_inputs=inputs, generator=1)
        fm.restructure(parent, grown.history)
    assert grown.certificate
    assert all(torch.equal(a, b) for a, b in zip(grown.model.parameters(), expected.model.parameters(), strict=True))
    trains(grown.model)


@pytest.mark.parametrize("operator", OPERATORS)
def test_parameters_of_inference_mode_become_ones_that_train(operator):
    with torch.inference_mode():
        parent = network()
        inputs = X.clone()
        grown = fm.morph(parent, operator, example_inputs=inputs)
    assert grown.certificate
    trains(grown.model)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("inputs", [None, X, X.to(memory_format=torch.channels_last)])
def test_channels_last(operator, inputs):
    grown = fm.morph(network().to(memory_format=torch.channels_last), operator, example_inputs=inputs)
    assert grown.certificate
    trains(grown.model)


def trains(model):
    assert not any(parameter.is_inference() or parameter.is_meta for parameter in model.parameters())
    model(X).square().sum().backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("inputs", [torch.randn(3, 9, 9), torch.randn(2, 3, 9, 9)])
def test_a_batch_norm_on_inputs_with_and_without_a_batch(inputs):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    grown = fm.morph(model, fm.Deepen("0", norm="batch"), example_inputs=inputs, calibrate=[inputs])
    assert grown.certificate
    assert fm.verify(model, grown.model, inputs, modes=("eval", "train"))


class Detector(nn.Module):
    """Images of any sizes in a list, and as many boxes as there are."""

    def __init__(self):
        super().__init__()
        self.backbone = network()

    def forward(self, images):
        scores = torch.cat([self.backbone(image[None]) for image in images])
        return scores[scores[:, 0] >= scores[:, 0].mean()]


def test_a_detector_is_refused_with_what_to_morph_instead():
    model, images = Detector(), [torch.randn(3, 9, 9), torch.randn(3, 8, 7)]
    for inputs in (None, (images,)):
        with pytest.raises(fm.MorphError, match=r"morph model\.backbone alone, and put the child in its place"):
            fm.widen(model, {"backbone.0": 12}, example_inputs=inputs)
    parent = copy.deepcopy(model)
    model.backbone = fm.widen(model.backbone, {"0": 12})
    assert fm.verify(parent, model, images)
    assert fm.verify(parent, fm.deepen(parent, "backbone.0", example_inputs=(images,)), images)


@pytest.mark.parametrize(
    "name", ["fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_torchvisions_detectors_are_refused_and_their_backbones_grow(name):
    declare_torchvision_operators()
    detection = pytest.importorskip(
        "torchvision.models.detection", reason="torchvision is not installed (requirements-zoo.txt)"
    )
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3).eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    layers = [n for n, m in model.backbone.named_modules() if type(m) is nn.Conv2d and n.startswith(("body", "features"))]
    layer, way = layers[len(layers) // 2], r"morph model\.backbone alone, and put the child in its place"
    for inputs, operator in ((images, fm.Widen(f"backbone.{layer}", "x1.5")), ((images,), fm.Deepen(f"backbone.{layer}"))):
        with pytest.raises(fm.MorphError, match=way):
            fm.morph(model, operator, example_inputs=inputs)
    x, child = torch.rand(1, 3, 64, 64), copy.copy(model)
    child._modules = {**model._modules, "backbone": fm.deepen(model.backbone, layer, example_inputs=x, verify=False)}
    assert fm.verify(model.backbone, child.backbone, x, exact=False)


# --- children that their class cannot hold -----------------------------------------------------------------------------------


class Pretrained(nn.Module):
    """What saves a model for its class to load, as Hugging Face's does."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return self.body(x)

    def save_pretrained(self, path):
        torch.save(self.state_dict(), path)

    def push_to_hub(self, path):
        self.save_pretrained(path)


def ways(child):
    return child, copy.deepcopy(child), pickle.loads(pickle.dumps(child))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(model)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_saving_a_child_that_its_class_cannot_load_raises(operator, wrap, tmp_path):
    parent = wrap(Pretrained().eval())
    values = {**vars(operator), "layer": ("body." if isinstance(parent, Pretrained) else "0.body.") + operator.layer}
    grown = fm.morph(parent, type(operator)(**values), example_inputs=X)
    assert grown.certificate
    for child in (
        *ways(grown.model),
        fm.restructure(parent, grown.history),
        fm.deepen(grown.model, values["layer"][:-1] + "6"),
    ):
        saver = child if isinstance(child, Pretrained) else child[0]
        for save in (saver.save_pretrained, saver.push_to_hub):
            with pytest.raises(fm.MorphError, match=r"from_pretrained cannot load: 'body.*restructure\(parent, history\)"):
                save(tmp_path / "child.pt")
    (parent if isinstance(parent, Pretrained) else parent[0]).save_pretrained(tmp_path / "parent.pt")
    child = fm.restructure(parent, grown.history)
    child.load_state_dict(grown.model.state_dict())
    assert torch.equal(child(X), grown.model(X)), "what the error says works"


def test_a_child_that_its_class_can_load_is_saved(tmp_path):
    child = fm.morph(Pretrained(), fm.Plan([])).model
    child.save_pretrained(tmp_path / "child.pt")


def test_a_network_of_transformers(tmp_path):
    declare_torchvision_operators()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-zoo.txt)")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    parent = transformers.BertModel(config).eval()
    call = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    layer = "encoder.layer.0.intermediate.dense"
    for operator in (fm.Deepen(layer), fm.Widen(layer, 56)):
        grown = fm.morph(parent, operator, example_inputs=call)
        assert grown.certificate
        for child in (*ways(grown.model), fm.restructure(parent, grown.history)):
            with pytest.raises(fm.MorphError, match=r"BertModel\.save_pretrained would write"):
                child.save_pretrained(tmp_path)
    parent.save_pretrained(tmp_path)


def test_a_child_shares_no_memory_with_its_parent():
    """Widths need no copy of what they replace; the rest is copied all the same."""
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    child = fm.widen(parent, {"0": 9}, example_inputs=torch.randn(2, 4))
    ours, theirs = (
        {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()} for model in (child, parent)
    )
    assert ours.isdisjoint(theirs)
    with torch.no_grad():
        for tensor in child.state_dict().values():
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())
