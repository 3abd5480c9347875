"""The picture that `fastmorph demo` draws of one layer: how it was solved, and its weights before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no window, no global state; PNGs are drawn by Agg
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastmorph.equation import compose

_TILES = 8  # kernels shown along each side, at most
_FLOOR = 1e-17  # float64 can be exact; a log scale cannot show 0


def draw(
    path: Path,
    layer: str,
    parent: Tensor,
    first: Tensor,
    second: Tensor,
    curves: Mapping[str, Sequence[float]],
    tolerance: float,
) -> None:
    """Write a PNG.

    Args:
        path: where to.
        layer: the layer's name.
        parent: its weight, (Co, Ci, *K).
        first: the first of the two that replace it, (Ch, Ci, *K1).
        second: the second, (Co, Ch, *K2).
        curves: relative residual after each half-step, by label.
        tolerance: the residual that counts as exact.
    """
    composed = compose(first, second, spatial_dims=parent.ndim - 2)
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    _residuals(top.subplots(), layer, curves, tolerance)
    bottom.suptitle(f"The weights of {layer}: one kernel a tile, outputs downwards, inputs across")
    difference = float((composed - parent).abs().max())
    panels = {
        "before: the parent's layer": parent,
        "after: its first layer": first,
        "after: its second layer": second,
        f"second after first: the parent's,\nto within {difference:.0e}": composed,
    }
    for axes, (title, weight) in zip(bottom.subplots(1, len(panels)), panels.items(), strict=True):
        _kernels(axes, title, weight)
    figure.savefig(path, dpi=110)


def _residuals(axes: Any, layer: str, curves: Mapping[str, Sequence[float]], tolerance: float) -> None:
    for (label, values), marker in zip(curves.items(), "*osD^v" * len(curves), strict=False):
        steps = range(1, len(values) + 1)
        size = 14 if len(values) == 1 else 5
        axes.plot(steps, np.maximum(values, _FLOOR), marker=marker, markersize=size, linewidth=1.3, label=label)
    axes.axhline(tolerance, color="0.35", linestyle="--", linewidth=1)
    axes.text(
        1.0, tolerance, f"below {tolerance:.0e}: exact in float32 ", transform=axes.get_yaxis_transform(), ha="right", va="top"
    )
    axes.set_yscale("log")
    axes.set_title(f"Splitting {layer} in two: how far from the parent's weight after each half-step")
    axes.set_xlabel("half-step (least squares for one of the two kernels)")
    axes.set_ylabel("relative residual")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)


def _kernels(axes: Any, title: str, weight: Tensor) -> None:
    """Draw the first kernels as tiles, blue below zero and red above."""
    tiles = weight[:_TILES, :_TILES].double().numpy()
    tiles = tiles.reshape(*tiles.shape[:2], tiles.shape[2] if tiles.ndim > 2 else 1, -1)
    if tiles.shape[3] == 1:  # taps in one dimension lie across
        tiles = tiles.swapaxes(2, 3)
    rows, columns, height, width = tiles.shape
    gap = [(0, 0), (0, 0), (0, max(1, height // 5)), (0, max(1, width // 5))]
    image = np.pad(tiles, gap, constant_values=np.nan).transpose(0, 2, 1, 3).reshape(rows * (height + gap[2][1]), -1)
    image = image[: -gap[2][1], : -gap[3][1]]
    largest = np.nanquantile(np.abs(image), 0.995) or 1.0
    axes.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    size = "x".join(map(str, weight.shape[2:]))
    axes.set_title(f"{title}\n{weight.shape[1]} -> {weight.shape[0]} channels, {size}", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_box_aspect(1)
    for side in axes.spines.values():
        side.set_visible(False)
