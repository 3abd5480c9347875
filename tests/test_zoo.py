"""Networks that nobody wrote for this library: each operator is exact at a random place, or algebra forbids it there."""

from __future__ import annotations

import pytest

from bench.zoo.models import architectures, missing
from bench.zoo.report import reason
from bench.zoo.trials import OPERATORS, visit

NAMES = [
    "torchvision/resnet18",
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mnasnet0_5",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "timm/starnet_s050",
    "timm/dla46_c",
    "timm/mobilenetv3_small_050",
    "timm/tinynet_e",
    "timm/regnetx_002",
    "timm/ese_vovnet19b_slim_dw",
    "timm/cspnext_tiny",
    "timm/edgenext_xx_small",
    "pytorchcv/nin_svhn",
    "pytorchcv/darknet_tiny",
    "pytorchcv/mnasnet_small",
    "pytorchcv/regnetx002",
    "pytorchcv/dla46xc",
    "pytorchcv/ror3_56_svhn",
    "pytorchcv/resnext20_32x2d_svhn",
    "transformers/bert",
    "transformers/convnext",
    "transformers/mobilenetv2",
    "transformers/regnet",
    "transformers/segformer",
    "transformers/vit",
    "transformers/llama",
    "transformers/resnet",
]
# What the algebra forbids, as the refusals say it.
FORBIDDEN = ("the model's output",)


@pytest.mark.parametrize("name", NAMES)
def test_exact_or_refused(name):
    package = missing(name.partition("/")[0])
    if package:
        pytest.skip(f"{package} is not installed (requirements-zoo.txt)")
    assert name in architectures()
    found = visit(name, places=1)
    assert not found.unusable
    assert {"deepen", "widen"} <= {trial.operator for trial in found.trials} <= set(OPERATORS)
    assert [trial for trial in found.trials if trial.outcome == "wrong"] == []
    refused = [reason(trial) for trial in found.trials if trial.outcome == "refused"]
    assert [why for why in refused if not any(words in why for words in FORBIDDEN)] == []
