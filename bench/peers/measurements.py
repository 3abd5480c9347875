"""What is claimed against peers; each row's residuals say what every contender preserved."""

from __future__ import annotations

from bench.measurements import Measurement

MEASUREMENTS = (
    Measurement("wider", "256 hidden units to 384: GroMo / fastmorph on a kept structure", "GroMo", "fastmorph"),
    Measurement("wider", "the same: Net2Wider by hand / fastmorph on a kept structure", "Net2Wider", "fastmorph"),
    Measurement("wider", "the same: fastmorph, following first / on a kept structure", "fastmorph, following", "fastmorph"),
    Measurement("deeper", "64 channels, 3x3: an identity layer by hand / fastmorph", "identity layer", "fastmorph"),
    Measurement("deeper", "the same: numpy's dense lstsq (float64, 16 channels) / fastmorph, per weight", "numpy", "fastmorph"),
    Measurement(
        "joint", "General, 5x5 -> (3, 3), 4 channels through 7: scipy's least_squares / fastmorph", "scipy", "fastmorph"
    ),
    Measurement(
        "steps", "growth steps of 64 layers of 16 units: GroMo's loop / at once", "GroMo, 16", "at once, 16", at_least=5
    ),
    Measurement("steps", "growth steps of 64 layers of 64 units: GroMo's loop / at once", "GroMo, 64", "at once, 64"),
)
