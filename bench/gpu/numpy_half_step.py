"""The numpy reference's half-step on all cores, timed alone, 3x3 into (3, 3): C, C_hid in, seconds and residual out."""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from fastmorph.equation import reference
from fastmorph.equation.frame import make_frame


def main() -> None:
    channels, hidden = map(int, sys.argv[1:])
    frame = make_frame((3, 3), ((3, 3), (3, 3)))
    draw = np.random.default_rng(0).standard_normal
    weight = draw((channels, channels, 3, 3))
    first = draw((hidden, channels, 3, 3)) / (9 * channels) ** 0.5
    start = time.perf_counter()
    solved = reference.half_step(weight, first, frame)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "residual": solved.trace[-1]}))


if __name__ == "__main__":
    main()
