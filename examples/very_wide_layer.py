"""A very wide layer becomes two, and wider: the closed form takes time in the number of weights and solves no system.

`--channels 4096` needs some 2 GB; the default runs anywhere.
"""

import argparse
import time

import torch
from torch import nn

import fastmorph as fm

parser = argparse.ArgumentParser()
parser.add_argument("--channels", type=int, default=512)
channels = parser.parse_args().channels

torch.manual_seed(0)
parent = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 8, 1)).eval()

began = time.perf_counter()
child = fm.deepen(parent, "0", hidden_channels=channels + channels // 2, activation="gelu", generator=0)
print(f"deepened in {time.perf_counter() - began:.2f} s: {tuple(child.get_parameter('0.first.weight').shape)}, then "
      f"{tuple(child.get_parameter('0.second.weight').shape)}")  # fmt: skip

began = time.perf_counter()
child = fm.widen(child, {"0.second": 2 * channels}, example_inputs=torch.randn(1, channels, 8, 8), generator=1)
print(f"widened in {time.perf_counter() - began:.2f} s: {tuple(child.get_parameter('0.second.weight').shape)}")

print(fm.verify(parent, child, torch.randn(2, channels, 8, 8)))
