"""What is claimed of solving equations."""

from __future__ import annotations

from bench.measurements import Exponent, Extrapolated, Measurement

MEASUREMENTS = (
    Measurement("half-step", "half-step, float64: numpy / torch", "numpy", "torch float64", at_least=8),
    Measurement("half-step", "half-step, float32: numpy (float64) / torch", "numpy", "torch float32"),
    Measurement("half-step", "Auto, float32: numpy's half-step (float64) / closed form", "numpy", "auto float32"),
    *(
        Measurement(
            "sweep", f"C = {c}: numpy's half-step / Auto", f"numpy C={c}", f"auto C={c}", at_least=500 if c >= 96 else None
        )
        for c in (48, 96, 128)
    ),
    *(
        Extrapolated(
            *("sweep", f"C = {c}: numpy's half-step, extrapolated from 128 in cubes / Auto", "numpy C=128", f"auto C={c}"),
            at_least=500,
            power=1.5,  # of the weights, which are squares of C
        )
        for c in (192, 256, 384, 512)
    ),
    Exponent(
        "sweep", "Auto's time by weights, C = 64 to 512 (exponent)", tuple(f"auto C={c}" for c in (64, 128, 256, 512)), 1.1
    ),
    Exponent("sweep", "numpy's time by weights, C = 48 to 128 (exponent)", ("numpy C=48", "numpy C=96", "numpy C=128")),
    *(
        Measurement("solvers", f"{case}: numpy, line by line / fastmorph", f"{solver} numpy", f"{solver} torch")
        for solver, case in {
            "General": "General, 5x5 -> (3, 3), 5 channels through 10, to 1e-10",
            "Practical": "Practical, 3x3 -> (3, 3), 24 channels through 36",
            "Direct": "Direct, 3x3 -> (3, 3), 64 channels through 96",
        }.items()
    ),
    Measurement("batch", "64 small equations: one by one / in one call", "loop", "batch"),
)
