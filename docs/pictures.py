"""Draws the pictures of the site, from what the library really returns: python docs/pictures.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from torch import nn

import fastmorph as fm

OUT = Path(__file__).parent / "pictures"
COLORS = "RdBu_r"


def show(axis, values, title, limit=None):
    limit = float(values.abs().max()) if limit is None else limit
    axis.imshow(values, cmap=COLORS, vmin=-limit, vmax=limit)
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def save(figure, name):
    figure.savefig(OUT / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def sign(axis, text):
    axis.axis("off")
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=18)


def equation():
    weight = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(2))
    answer = fm.decompose(weight, 4, (3, 3), generator=0, solver=fm.General())
    figure, axes = plt.subplots(1, 11, figsize=(10, 1.6), width_ratios=[5, 1, *[3, 0.6, 3, 0.8] * 2, 1])
    limit = 1.1 * max(float(answer.first.abs().max()), float(answer.second.abs().max()))
    show(axes[0], weight[0, 0], "G, 5x5")
    sign(axes[1], "=")
    for place, hidden in enumerate((0, 1)):
        second, times, first, plus = axes[2 + 4 * place : 6 + 4 * place]
        show(second, answer.second[0, hidden], f"F2, channel {hidden + 1}", limit)
        sign(times, "*")
        show(first, answer.first[hidden, 0], f"F1, channel {hidden + 1}", limit)
        sign(plus, "+")
    sign(axes[10], "...")
    save(figure, "equation")


def closed_form():
    weight = torch.randn(24, 24, 3, 3, generator=torch.Generator().manual_seed(0)) / 15
    ours = fm.decompose(weight, 32, (3, 3), generator=0)
    identity = torch.zeros(24, 24, 3, 3)
    identity[range(24), range(24), 1, 1] = 1
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
    pairs = [("ours: F1", ours.first), ("ours: F2", ours.second), ("identity: F1", weight), ("identity: F2", identity)]
    for axis, (title, kernel) in zip(axes, pairs, strict=True):
        nonzero = 100 * float((kernel != 0).float().mean())
        show(axis, kernel[:, :, 1, 1], f"{title}\n{nonzero:.2g} % non-zero" if nonzero < 100 else f"{title}\nno entry is zero")
    save(figure, "closed_form")


def borders():
    torch.manual_seed(0)
    parent = nn.Conv2d(3, 3, 5, padding=2).double()
    x = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    answer = fm.decompose(parent.weight.detach(), 24, (3, 3), generator=0)
    habit = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.Conv2d(24, 3, 3, padding=1)).double()
    habit.load_state_dict({"0.weight": answer.first, "1.weight": answer.second, "1.bias": parent.bias})
    child = fm.deepen(nn.Sequential(parent), "0", hidden_channels=24, kernel_sizes=(3, 3), generator=0)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2))
    names = ("each layer pads by itself", "all padding in front")
    for axis, name, grown in zip(axes, names, (habit, child), strict=True):
        error = ((grown(x) - parent(x)).abs().amax(1)[0] / parent(x).abs().max()).detach()
        image = axis.imshow(error.clamp_min(1e-17).log10(), cmap="magma", vmin=-17, vmax=0)
        axis.set_title(f"{name}\nlargest error {float(error.max()):.0e}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="log10 of the error")
    save(figure, "borders")


def twins():
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    child = fm.widen(parent, {"0": 12}, generator=3)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), width_ratios=[8, 12])
    show(axes[0], child[0].weight.detach(), "the layer: rows 1 to 6 are old, then twins")
    axes[0].axhline(5.5, color="black")
    show(axes[1], child[2].weight.detach(), "its reader: columns R and -R")
    axes[1].axvline(5.5, color="black")
    save(figure, "twins")


def hidden_channels():
    weight = torch.randn(6, 6, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = range(2, 19)
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for name, solver in (("best found (General)", fm.General()), ("the paper's Algorithm 2 (Practical)", fm.Practical())):
        answers = [fm.decompose(weight, c, (3, 3), solver=solver, generator=0, allow_inexact=True) for c in counts]
        axis.semilogy(counts, [max(float(answer.residual), 1e-17) for answer in answers], marker=".", label=name)
    needed = weight.numel() / (2 * 6 * 9)  # as many unknowns as there are equations
    axis.axvline(needed, color="gray", linestyle=":", label="counting bound")
    axis.set_xlabel("hidden channels")
    axis.set_ylabel("relative residual")
    axis.legend(fontsize=8)
    save(figure, "hidden_channels")


def training():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=generator)
    y = torch.sin(x @ torch.randn(12, 4, generator=generator))

    def steps(model, optimizer, count):
        losses = []
        for _ in range(count):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        return model, optimizer, steps(model, optimizer, 150)

    figure, axis = plt.subplots(figsize=(6, 3.2))
    model, optimizer, before = start()
    grown = fm.morph(model, fm.Widen("2", 72), example_inputs=x, optimizer=optimizer, generator=0)
    axis.semilogy(before + steps(grown.model, grown.optimizer, 150), label="grown, with its optimizer")
    model, optimizer, before = start()
    torch.manual_seed(1)
    wide = nn.Sequential(model[0], model[1], nn.Linear(24, 72), nn.Tanh(), nn.Linear(72, 4))
    axis.semilogy(before + steps(wide, torch.optim.Adam(wide.parameters(), lr=3e-3), 150), label="wider layers drawn anew")
    model, optimizer, before = start()
    axis.semilogy(before + steps(model, optimizer, 150), color="gray", linestyle=":", label="not grown")
    axis.axvline(150, color="black", linewidth=0.5)
    axis.set_xlabel("step; 24 units become 72 at step 150")
    axis.set_ylabel("training loss")
    axis.legend(fontsize=8)
    save(figure, "training")


def learning():
    """As the experiments drew it."""
    shutil.copy(Path(__file__).parents[1] / "bench" / "learning" / "results.svg", OUT / "learning.svg")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "fastmorph"
    for draw in (equation, closed_form, borders, twins, hidden_channels, training, learning):
        draw()
