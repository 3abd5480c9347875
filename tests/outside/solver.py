"""A solver of linear layers by singular values: G = (U s) V^T, exact from as many hidden channels as the weight's rank on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fastmorph as fm
from fastmorph.equation.solvers.base import Equation, Solution


@dataclass(frozen=True)
class Singular(fm.Solver):
    """Split the singular values evenly between the two kernels."""

    def solve(self, equation: Equation) -> Solution:
        if equation.frame.kernel:
            raise fm.MorphError("Singular is for linear layers; use fm.Auto() for convolutions.")
        left, values, right = torch.linalg.svd(equation.weight, full_matrices=False)
        rank = min(equation.hidden, values.shape[-1])
        root = values[:, :rank].sqrt()
        first = equation.start()  # rows beyond the rank are noise, which F2 does not read
        first[:, :rank] = root[:, :, None] * right[:, :rank]
        second = equation.weight.new_zeros(len(left), left.shape[1], equation.hidden)
        second[:, :, :rank] = left[:, :, :rank] * root[:, None, :]
        return Solution(first, second, values.new_empty(0, len(values)), torch.zeros(len(values), dtype=torch.int64))
