"""What a user does first, on an installation: an equation against numpy, a network with its certificate, the command."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastmorph as fm

assert "site-packages" in Path(fm.__file__).parts, fm.__file__

weight = np.random.default_rng(0).standard_normal((6, 4, 5, 5))
answer = fm.decompose(weight, 24, (3, 3), generator=0)
product = np.zeros_like(weight)
for u, v in itertools.product(np.ndindex(3, 3), repeat=2):  # the full convolution, tap by tap
    product[:, :, u[0] + v[0], u[1] + v[1]] += answer.second[:, :, *v] @ answer.first[:, :, *u]
error = np.linalg.norm(product - weight) / np.linalg.norm(weight)
assert error <= fm.tolerance(torch.float64), error

torch.manual_seed(0)
parent = nn.Sequential(
    nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(216, 4)
).eval()
plan = fm.Plan([fm.Widen("0", 12), fm.GrowKernel("0", 7), fm.Deepen("3", activation="relu")])
grown = fm.morph(parent, plan, example_inputs=torch.randn(2, 3, 8, 8), optimizer=torch.optim.AdamW(parent.parameters()))
assert grown.certificate, grown.certificate

command = [str(Path(sys.executable).with_name("fastmorph")), "--version"]
shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
assert fm.__version__ in shown, shown
python = ".".join(map(str, sys.version_info[:3]))
print(
    f"fastmorph {fm.__version__}, Python {python}, torch {torch.__version__}: residual {error:.0e}, {grown.certificate.verdict}"
)
