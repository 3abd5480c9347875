"""What is claimed of whole networks."""

from __future__ import annotations

from bench.measurements import Exponent, Measurement

_BLOCKS = {"resnet50": 16, "resnet152": 50, "wide_resnet50_2": 16, "densenet121": 58, "vgg16": 12, "transformer": 24}
_TARGETS = {"pair": 2.5, "zero": 1.5, "duplicate": 1.5}


def _ratio(case: str, over: str, under: str, at_most: float) -> Measurement:
    return Measurement("networks", case, over, under, at_most=at_most)


MEASUREMENTS = (
    *(_ratio(f"{name}: {n} Widen / one Widen", f"{name} plan", f"{name} one", 1.5) for name, n in _BLOCKS.items()),
    *(
        _ratio(f"{name}: {n} Widen without weights / its structure run once", f"{name} restructure", f"{name} structure", 12)
        for name, n in _BLOCKS.items()
    ),
    *(
        _ratio(
            f"{name}: every block Widen, Deepen, GrowKernel in turn / the three alone", f"{name} mixed", f"{name} parts", 1.25
        )
        for name in ("resnet50", "resnet152")
    ),
    *(
        _ratio(f"{size}: filling, {fill} / cloning", f"{name} {fill}", f"{name} clone", at_most)
        for name, size in (("stack", "57 to 83 million weights"), ("wide", "2048 channels"))
        for fill, at_most in _TARGETS.items()
    ),
    *(
        _ratio(
            f"a Llama of 24 layers, 303 million weights: stream, {fill} / cloning the child", f"Llama {fill}", "Llama clone", n
        )
        for fill, n in (("zero", 5), ("rotate", 15))
    ),
    *(
        _ratio(f"{name}: every layer's coupling / Torch-Pruning's groups", f"{name} groups", f"{name} Torch-Pruning", 3)
        for name in ("resnet50", "resnet152", "densenet121", "vgg16")
    ),
    Exponent("networks", "a plan's cost by layers (exponent)", ("depth 20", "depth 56", "depth 110"), at_most=1.1),
    Exponent(
        "networks", "a plan's cost by weights (exponent)", ("width 64", "width 256", "width 1024", "width 4096"), at_most=1.1
    ),
    Exponent(
        "networks",
        "following by channels (exponent)",
        ("following 64", "following 256", "following 1024", "following 4096"),
        at_most=1.1,
    ),
    *(
        _ratio(f"{name}: certificate / its 4 forward passes", f"{name} certificate", f"{name} forwards", 1.5)
        for name in ("resnet50", "vgg16")
    ),
    *(_ratio(f"{name}: plan with consume / without", f"{name} consume", f"{name} plan", 1) for name in ("resnet50", "vgg16")),
)
