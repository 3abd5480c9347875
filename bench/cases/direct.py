"""The kernels of the closed form: every configuration at the shapes and layouts that decide what is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fastmorph_kernels.configs import Shipped, shipped
from fastmorph_kernels.direct.kernel import direct_kernel, sums_kernel
from fastmorph_kernels.direct.launch import SCALES_BLOCK
from fastmorph_kernels.direct.mixing import SIDE
from fastmorph_kernels.direct.scales_kernel import scales_kernel

from bench.cases.case import Case, aligned_with

_TYPES = {"dealing_ptr": "*i32", "seed_ptr": "*i64"}


class _Layout(NamedTuple):
    """How columns of the weight, of its factor and of the delta's lie, and the strides that are 1, for each factor."""

    source: str
    weight: str
    delta: str
    unit: dict[str, tuple[str, ...]]


_ROWS = ("stride_wz", "stride_oz")
_LAYOUTS = {  # contiguous 3x3 and 1x1 weights, into `first` and into `second`, and into a larger kernel
    "conv": _Layout("uniform", "uniform", "run", {"weight": _ROWS, "delta": ("stride_oz",)}),
    "odd": _Layout("uniform", "uniform", "run", {"weight": _ROWS, "delta": ("stride_oz",)}),  # sizes that are no multiples
    "odd_t": _Layout("taps", "run", "uniform", {"weight": _ROWS, "delta": ("stride_oz",)}),
    "conv_t": _Layout("taps", "run", "uniform", {"weight": _ROWS, "delta": ("stride_oz",)}),
    "linear": _Layout("uniform", "uniform", "uniform, rows closer", {"weight": _ROWS, "delta": ("stride_oh",)}),
    "linear_t": _Layout(
        "uniform, rows closer",
        "uniform, rows closer",
        "uniform",
        {"weight": ("stride_wo", "stride_oh"), "delta": ("stride_oz",)},
    ),
    "grown": _Layout("taps", "uniform", "taps", {"weight": _ROWS, "delta": ("stride_oz",)}),
    "any": _Layout("rows closer", "rows closer", "rows closer", {}),
    "far": _Layout("rows closer", "rows closer", "rows closer", {}),  # so large that offsets are wide
}
_IRREGULAR, _UNALIGNED = ("any", "far"), ("any", "far", "odd", "odd_t")
# Channels of a block, rows of the weight and rows of noise among them; None: blocks share pairs.
_Sizes = tuple[int, int, int | None]
_WIDENED, _SHARED = (32, 16, 16), (32, 32, None)
_OTHERS: tuple[_Sizes, ...] = ((32, 32, 16), (32, 16, 32), (16, 16, 16))


def cases(target: str) -> Iterator[Case]:
    """Every configuration; on sm_90, for which they were chosen, float32 in every layout and with every kind of block too."""
    yield from (_scales(dtype, given) for dtype in ("float32", "float64") for given in (False, True))
    for entry in shipped("direct"):
        every = target == "sm_90" and entry.dtype.itemsize == 4
        if entry.variant == "sums":
            yield from (_sums(entry, name) for name in (("conv", "conv_t", "linear_t", "far") if every else ("conv",)))
            continue
        pairs: list[tuple[str, _Sizes]] = [("conv", _WIDENED), ("conv_t", _SHARED)]
        if every:
            pairs = [(name, _WIDENED) for name in _LAYOUTS] + [("conv", sizes) for sizes in _OTHERS]
            pairs += [(name, _SHARED) for name in ("conv_t", "odd", "odd_t", "far")]
        factor, _, many = entry.variant.partition("_")
        for name, sizes in pairs:
            run = factor == "weight" and _LAYOUTS[name].weight == "run"
            crowded = sizes[2] in (None, SIDE) or (run and sizes[1] == SIDE)
            if bool(many) == (crowded or name in _IRREGULAR):
                yield _factor(entry, name, sizes, factor, target)


def _scales(dtype: str, given: bool) -> Case:
    types = {"balance_ptr": "*fp64"}
    constants = {"GIVEN": given, "BLOCK": SCALES_BLOCK}
    return Case("direct", scales_kernel, dtype, "scales_given" if given else "scales", constants, {"num_warps": 4}, types=types)


def _factor(entry: Shipped, name: str, sizes: _Sizes, factor: str, target: str) -> Case:
    layout, (channels, held, noise) = _LAYOUTS[name], sizes
    out = layout.delta if factor == "delta" else layout.weight
    constants = _source(name) | {
        "DELTA": factor == "delta",
        "SHARED": noise is None,
        "PRECISION": "ieee" if target == "gfx942" or _accumulator(entry) == "fp64" else "tf32x3",
        "UNIFORM_O": "uniform" in out,
        "ROWS_CLOSER_O": "closer" in out,
        "RUN_O": out == "run",
        "ALIGNED": name not in _UNALIGNED,
        "BLOCK_M": entry.config["block_m"] if channels == SIDE else 64,  # what a layer of few columns gets
        "BLOCK_H": channels,
        "BLOCK_G": held,
        "BLOCK_S": noise or 16,
    }
    if factor == "delta":
        constants["UNIFORM_W"] = False
    return _case(entry, direct_kernel, name, layout.unit.get(factor, ()), constants)


def _sums(entry: Shipped, name: str) -> Case:
    unit = tuple(n for n in _LAYOUTS[name].unit.get("weight", ()) if n.startswith("stride_w"))
    constants = _source(name) | {"BLOCK_M": entry.config["block_m"], "BLOCK_R": entry.config["span"]}
    return _case(entry, sums_kernel, name, unit, constants)


def _source(name: str) -> dict[str, Any]:
    source, side = _LAYOUTS[name].source, 1 if name.startswith("linear") else 3
    sizes = {"SIZE_X": 1, "SIZE_Y": side, "SIZE_Z": side}
    return sizes | {"UNIFORM_W": "uniform" in source, "ROWS_CLOSER_W": "closer" in source, "WIDE": name == "far"}


def _case(entry: Shipped, function: Any, layout: str, unit: tuple[str, ...], constants: dict[str, Any]) -> Case:
    names = (name for name in function.arg_names if name in ("mixing_ptr", "sums_ptr", "scale_ptr"))
    return Case(
        kernel="direct",
        function=function,
        dtype=str(entry.dtype).removeprefix("torch."),
        variant=entry.variant,
        constants=constants,
        options={"num_warps": entry.config["num_warps"], "num_stages": entry.config["num_stages"]},
        layout=layout,
        unit=unit,
        aligned=(*aligned_with(function, unit), "columns") if layout not in _UNALIGNED else (),
        types=_TYPES | dict.fromkeys(names, f"*{_accumulator(entry)}"),
    )


def _accumulator(entry: Shipped) -> str:
    return "fp64" if entry.dtype.itemsize == 8 else "fp32"
