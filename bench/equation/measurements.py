"""What is claimed of solving equations."""

from __future__ import annotations

from bench.measurements import Measurement

MEASUREMENTS = (
    Measurement("half-step", "half-step, float64: numpy / torch", "numpy", "torch float64", at_least=8),
    Measurement("half-step", "half-step, float32: numpy (float64) / torch", "numpy", "torch float32"),
    Measurement("half-step", "Auto, float64: numpy's half-step / closed form", "numpy", "auto float64", at_least=300),
    Measurement("half-step", "Auto, float32: numpy's half-step (float64) / closed form", "numpy", "auto float32"),
    Measurement("scaling", "Auto's time per weight entry: C = 256 / C = 64", "C=256", "C=64", at_most=1.5),
    Measurement("batch", "64 small equations: one by one / in one call", "loop", "batch"),
)
