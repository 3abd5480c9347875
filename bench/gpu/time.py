"""Part `time`: the four targets, against the ceilings of this device as they are measured in the same run."""

from __future__ import annotations

from collections.abc import Callable

from bench.gpu import targets
from bench.gpu.ceilings import Ceilings
from bench.gpu.report import Report
from bench.gpu.setup import Setup

Section = Callable[[Setup, Report, Ceilings], None]

# The numpy reference takes what time is left.
SECTIONS: dict[str, Section] = {
    "closed_form": targets.closed_form,
    "half_step": targets.half_step,
    "vgg": targets.vgg,
    "general": targets.general,
    "half_step_numpy": targets.half_step_numpy,
}
