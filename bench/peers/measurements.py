"""What is claimed against peers; each row's residuals say what every contender preserved."""

from __future__ import annotations

import importlib.util

from bench.measurements import Measurement

WIDTHS = (256, 1024)
_INSTALL = "which is not installed: pip install --no-deps -r bench/peers/requirements.txt"
LEFT_OUT = {
    peer: _INSTALL for peer, package in {"GroMo": "gromo", "nni": "nni"}.items() if not importlib.util.find_spec(package)
}


def _wider(units: int) -> list[Measurement]:
    ours = f"fastmorph, {units}"
    return [
        Measurement("wider", f"{units} hidden units and half as many more: {peer} / fastmorph", f"{peer}, {units}", ours)
        for peer in ("GroMo", "nni", "Net2Wider", "fastmorph, following")
    ]


MEASUREMENTS = (
    *(row for units in WIDTHS for row in _wider(units)),
    Measurement("deeper", "64 channels, 3x3: an identity layer by hand / fastmorph", "identity layer", "fastmorph"),
    Measurement("deeper", "the same: numpy's dense lstsq (float64, 16 channels) / fastmorph, per weight", "numpy", "fastmorph"),
    *(
        Measurement(
            *("joint", f"General, 5x5 -> (3, 3), {c} channels through {h}: scipy's least_squares / fastmorph"),
            *(f"scipy, {c}", f"fastmorph, {c}"),
        )
        for c, h in ((4, 7), (8, 14))
    ),
    Measurement(
        "steps", "growth steps of 64 layers of 16 units: GroMo's loop / at once", "GroMo, 16", "at once, 16", at_least=5
    ),
    Measurement("steps", "growth steps of 64 layers of 64 units: GroMo's loop / at once", "GroMo, 64", "at once, 64"),
)
