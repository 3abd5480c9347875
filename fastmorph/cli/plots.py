"""The picture that `fastmorph demo` draws of one layer: how it was solved, and its weights before and after."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no window, no global state; PNGs are drawn by Agg
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastmorph.equation.decompose import compose

_FLOOR = 1e-17  # float64 can be exact; a log scale cannot show 0
Curve = tuple[Sequence[float], Sequence[float]]


def draw(
    path: Path,
    layer: str,
    parent: Tensor,
    first: Tensor,
    second: Tensor,
    curves: Mapping[str, Curve],
    tolerance: float,
) -> None:
    """Write a PNG.

    Args:
        path: where to.
        layer: the layer's name.
        parent: its weight, (Co, Ci, *K).
        first: the first of the two that replace it, (Ch, Ci, *K1).
        second: the second, (Co, Ch, *K2).
        curves: by label, numbers of half-steps and the relative residual after each.
        tolerance: the residual that counts as exact.
    """
    composed = compose(first.double(), second.double(), spatial_dims=parent.ndim - 2)
    figure: Any = Figure(figsize=(13, 9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    _residuals(top.subplots(), layer, curves, tolerance)
    bottom.suptitle(
        f"Some weights of {layer}: a tile is the kernel from one channel (across) to another (down); blue < 0 < red"
    )
    difference = float((composed - parent).norm() / parent.norm())
    panels = {
        "before: the layer of the parent": parent,
        "after: first of two layers": first,
        "after: second of two layers": second,
        f"second after first: as before, to {difference:.0e}": composed,
    }
    for axes, (title, weight) in zip(bottom.subplots(1, len(panels)), panels.items(), strict=True):
        _kernels(axes, title, weight)
    figure.savefig(path, dpi=110)


def _residuals(axes: Any, layer: str, curves: Mapping[str, Curve], tolerance: float) -> None:
    styles = itertools.cycle([("*", 14), ("o", 7), (".", 5), ("D", 5)])
    for (label, (steps, values)), (marker, size) in zip(curves.items(), styles, strict=False):
        axes.plot(steps, np.maximum(values, _FLOOR), marker=marker, markersize=size, linewidth=1.3, label=label)
    axes.axhline(tolerance, color="0.35", linestyle="--", linewidth=1)
    label = f"below {tolerance:.0e} counts as exact for weights in float32"
    axes.text(0.5, tolerance / 2, label, transform=axes.get_yaxis_transform(), ha="center", va="top", color="0.25")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_title(f"Splitting {layer} in two: how far from the parent's weight after each half-step")
    axes.set_xlabel("half-steps (each solves for one of the two kernels, by least squares)")
    axes.set_ylabel("relative residual, in float64")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(0.99, 0.08), framealpha=1)


def _kernels(axes: Any, title: str, weight: Tensor) -> None:
    """Draw the first kernels as tiles, blue below zero and red above."""
    kernels = weight.double().numpy().reshape(*weight.shape[:2], -1, math.prod(weight.shape[3:]))
    if kernels.shape[3] == 1:  # a kernel of one dimension lies across
        kernels = kernels.swapaxes(2, 3)
    tiles = kernels[:16, :4] if kernels.shape[2] == 1 else kernels[:8, :8]
    rows, columns, height, width = tiles.shape
    down, across = height + max(1, height // 5), width + max(1, width // 5)  # with the gap to the next tile
    image = np.full((rows * down, columns * across), np.nan)
    for row, column in np.ndindex(rows, columns):
        image[row * down :, column * across :][:height, :width] = tiles[row, column]
    largest = np.nanquantile(np.abs(image), 0.995) or 1.0
    axes.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    size = "x".join(map(str, weight.shape[2:]))
    axes.set_title(f"{title}\n{weight.shape[1]} -> {weight.shape[0]} channels, {size}", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_box_aspect(1)
    for side in axes.spines.values():
        side.set_visible(False)
