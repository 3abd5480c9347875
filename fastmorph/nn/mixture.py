"""A mixture of experts: a router chooses for each position which of several networks compute its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn


class Mixture(nn.Module):
    """y = sum over the `top_k` experts of the largest logits of softmax(those logits)_i * `experts[i](x)`, by position.

    The weights of the chosen ones sum to 1 (Jiang et al., "Mixtral of Experts", 2024, Section 2.1), so that experts that all
    compute the same compute it together, whatever the router says.

    Args:
        router: a layer that makes a logit for each expert of a position, (*, d) -> (*, n).
        experts: n modules that map (*, d) to (*, e), each position by itself.
        top_k: how many experts a position has, 1 <= top_k <= n.

    Attributes:
        sparse: whether each expert computes its own positions alone, as it should; else all compute all, with weights of zero
            for what was not chosen, which is slower, and runs the same operators whatever the values are.
    """

    followed_with: ClassVar = {"sparse": False}  # where channels are followed, nothing may branch on values

    def __init__(self, router: nn.Module, experts: Iterable[nn.Module], top_k: int) -> None:
        super().__init__()
        self.router, self.experts = router, nn.ModuleList(experts)
        self.top_k, self.sparse = top_k, True

    def forward(self, input: Tensor) -> Tensor:
        """(*, d) -> (*, e)."""
        logits, chosen = self.router(input).topk(self.top_k, dim=-1)
        shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if not self.sparse:
            whole = shares.new_zeros((*shares.shape[:-1], len(self.experts))).scatter(-1, chosen, shares)
            first, *rest = (whole[..., i : i + 1] * expert(input) for i, expert in enumerate(self.experts))
            return sum(rest, start=first).to(input.dtype)
        positions = input.reshape(-1, input.shape[-1])
        chosen, shares = chosen.reshape(-1, self.top_k), shares.reshape(-1, self.top_k)
        output: Tensor | None = None
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            part = shares[row, place, None] * expert(positions[row])
            output = part.new_zeros(len(positions), part.shape[-1]) if output is None else output
            output = output.index_add(0, row, part)
        assert output is not None
        return output.reshape(*input.shape[:-1], output.shape[-1]).to(input.dtype)

    def extra_repr(self) -> str:
        """How many experts a position has."""
        return f"top_k={self.top_k}"
