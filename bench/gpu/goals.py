"""What is claimed of a GPU: ratios of times taken in one run, and the targets they are held to."""

from __future__ import annotations

from bench.measurements import Measurement

DIRECT = Measurement(
    "gpu", "closed form, 2048 -> 4096 channels, 3x3, float32: memory floor / kernels", "floor", "kernels", at_least=0.7
)
HALF_STEP_LSTSQ = Measurement(
    "gpu", "half-step, 512 -> 1536 channels, 3x3, float64: torch.linalg.lstsq / decompose", "lstsq", "decompose", at_least=10
)
HALF_STEP_NUMPY = Measurement(
    "gpu", "half-step, 512 -> 1536 channels, 3x3, float64: numpy / decompose", "numpy", "decompose", at_least=100
)
HALF_STEP_RATE = Measurement(
    "gpu", "half-step, 512 -> 1536 channels, 3x3, float64: arithmetic floor / decompose", "floor", "decompose", at_least=0.5
)
VGG = Measurement("gpu", "VGG-16's 13 convolutions, float32: loop, torch backend / decompose_many", "loop", "batch", at_least=5)
GENERAL = Measurement(
    "gpu", "64 x 64 channels, 5x5 -> (3, 3), 128 hidden, General: loop, torch backend / batch", "loop", "batch", at_least=20
)
GOALS = (DIRECT, HALF_STEP_LSTSQ, HALF_STEP_NUMPY, HALF_STEP_RATE, VGG, GENERAL)
