"""`fastmorph demo`: train or load a small network, deepen every layer, and show that it computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastmorph as fm
from fastmorph.cli.case import Case
from fastmorph.cli.child import NetworkCall, verify_command, write_child
from fastmorph.cli.crepe import crepe_case
from fastmorph.cli.digits import digits_case

_MODES = ("eval", "train")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WAYS: tuple[tuple[str, fm.Solver], ...] = (  # by which the picture's layer is split, for the splits of a case
    ("Claim 1 holds: one half-step, as in the child", fm.General(1)),
    ("Algorithm 1 accelerated (longer steps, spread evenly)", fm.General(40)),
    ("Algorithm 1 as in the paper", fm.General(40, acceleration=None)),
    ("Algorithm 2: shrinks the second kernel, zeros remain", fm.Practical()),
)


def run(model: str, out: Path, *, seed: int, activation: str, epochs: int, progress: bool) -> int:
    """Run the demo, print and write its findings; returns the exit status, 0 only if the certificate holds."""
    from safetensors.torch import save_model

    fm.nn.PActivation(activation)  # its refusal concerns no layer
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        torch.manual_seed(seed)
        case = digits_case(epochs, progress) if model == "digits" else crepe_case()
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
    print(f"  {verify_command(case.factory, out / files[0], out, call, _MODES)}")
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


def _draw(case: Case, parent: nn.Module, child: nn.Module, path: Path, seed: int) -> None:
    from fastmorph.cli.plots import draw

    weight = _weight(parent, case.shown)
    curves = {}
    for split, (way, solver) in zip((case.enough, case.below, case.below, case.shrunk), _WAYS, strict=True):
        found = fm.decompose(
            weight,
            split.hidden_channels,
            split.kernel_sizes,
            solver=solver,
            generator=torch.Generator().manual_seed(seed),
            allow_inexact=True,  # some of these curves stop before they arrive
        )
        # Accelerated solvers record the ends of longer steps, worth several half-steps each: these are spread evenly.
        steps, values = int(found.iterations), found.trace.tolist()
        label = f"{split.hidden_channels} channels, {split.text}, {way}"
        curves[label] = ([steps * (i + 1) / len(values) for i in range(len(values))], values)
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
