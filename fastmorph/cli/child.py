"""Writing a child and its certificate, and telling what was done: what `fastmorph morph` and `fastmorph demo` share."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmorph.cli.networks import shape_text

if TYPE_CHECKING:
    from torch import nn

    from fastmorph.certify.certificate import Certificate
    from fastmorph.inputs import Inputs
    from fastmorph.plan.plan import Plan
    from fastmorph.plan.step import Step


class NetworkCall(NamedTuple):
    """What a network is called with, and the options of the command line that say so."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: tuple[str, ...]

    @property
    def inputs(self) -> Inputs | None:
        """The call as `morph` takes it; None for one without arguments."""
        from fastmorph.inputs import Inputs

        return Inputs(self.args, self.kwargs) if self.args or self.kwargs else None


def write_child(
    parent: nn.Module,
    plan: Plan,
    out: Path,
    call: NetworkCall,
    *,
    seed: int | None,
    modes: Sequence[str],
    tolerance: float | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Certificate | None]:
    """Morph, print what was done, and write child.safetensors, plan.toml and, where there are inputs, certificate.json.

    `seed` decides the child; None: the plan's own does. Returns the child and the certificate, which may not hold; None without
    inputs.
    """
    import torch
    from safetensors.torch import save_model

    import fastmorph as fm

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    grown = fm.morph(parent, plan, example_inputs=call.inputs, verify=False, generator=generator, progress=progress)
    print_steps(grown.steps)
    before, after = (sum(p.numel() for p in network.parameters()) for network in (parent, grown.model))
    print(f"Parameters: {before:,} before, {after:,} after.")
    out.mkdir(parents=True, exist_ok=True)
    save_model(grown.model, str(out / "child.safetensors"))
    grown.history.save(out / "plan.toml")
    if not call.args and not call.kwargs:
        return grown.model, None
    certificate = fm.verify(parent, grown.model, *call.args, modes=modes, tolerance=tolerance, kwargs=call.kwargs)
    (out / "certificate.json").write_text(certificate.to_json() + "\n", encoding="utf-8")
    shapes = ", ".join(shape_text(t.shape) for t in (*call.args, *call.kwargs.values()))
    print(f"\nCertificate: child against parent, on {shapes}\n{certificate}")
    return grown.model, certificate


def print_steps(steps: Sequence[Step]) -> None:
    """A table of what each morph did."""
    rows = [("layer", "weight before", "weights after", "residual", "ms", "how")]
    for step in steps:
        after = " and ".join(map(shape_text, step.after))
        residual = f"{'~' if step.estimated else ''}{step.residual:.1e}"
        rows.append((step.layer, shape_text(step.before), after, residual, f"{step.milliseconds:.1f}", step.how))
    print_table(rows)
    if any(step.estimated for step in steps):
        print("  ~: estimated from random sums of channels; the certificate compares outputs.")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of equal length, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())


def verify_command(
    model: str,
    parent: Path,
    out: Path,
    call: NetworkCall,
    modes: Sequence[str],
    tolerance: float | None = None,
    imports: Sequence[str] = (),
) -> str:
    """The command line that checks what `write_child` wrote."""
    words = [word for module in imports for word in ("--import", module)]
    words += ["--model", model, "--parent", str(parent), "--plan", str(out / "plan.toml")]
    words += ["--child", str(out / "child.safetensors"), *call.options, "--modes", ",".join(modes)]
    words += [] if tolerance is None else ["--tolerance", repr(tolerance)]
    return shlex.join([*_program(), "verify", *words])


def _program() -> list[str]:
    """How to call this program from the current directory."""
    here = Path(sys.executable).parent
    if (found := shutil.which("fastmorph")) and Path(found).parent == here:
        return ["fastmorph"]
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    return [os.path.relpath(sys.executable) if inside else sys.executable, "-m", "fastmorph"]
