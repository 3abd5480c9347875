"""What is claimed against peers; each row's residuals say what every contender preserved."""

from __future__ import annotations

import importlib.util

from bench.measurements import Measurement

WIDTHS = ((256, "units"), (1024, "units"), (64, "convolutions"), (256, "convolutions"))
_INSTALL = "which is not installed: pip install --no-deps -r bench/peers/requirements.txt"
LEFT_OUT = {
    peer: _INSTALL for peer, package in {"GroMo": "gromo", "nni": "nni"}.items() if not importlib.util.find_spec(package)
}


def of_kind(kind: str) -> tuple[str, ...]:
    """Who is timed on layers of this kind: GroMo on linear ones alone."""
    return ("GroMo",) * (kind == "units") + ("nni", "Net2Wider", "fastmorph", "fastmorph, following")


def _wider(old: int, kind: str) -> list[Measurement]:
    told = f"{old} units and half as many more" if kind == "units" else f"{old} channels, 3x3, and half as many more"
    peers = [peer for peer in of_kind(kind) if peer != "fastmorph"]
    return [
        Measurement("wider", f"{told}: {peer} / fastmorph", f"{peer}, {old} {kind}", f"fastmorph, {old} {kind}")
        for peer in peers
    ]


MEASUREMENTS = (
    *(row for old, kind in WIDTHS for row in _wider(old, kind)),
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
