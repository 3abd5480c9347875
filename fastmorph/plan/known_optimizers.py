"""The optimizers that are known from the start: PyTorch's own, and those of packages that need not be installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn, optim

from fastmorph.plan.optimizer_rules import Follow, optimizer_rule

_ADAM: dict[str, Follow] = {"exp_avg": "linear", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}
_RMSPROP: dict[str, Follow] = {"square_avg": "square", "momentum_buffer": "linear", "grad_avg": "linear"}
_BELIEF: dict[str, Follow] = {"exp_avg": "linear", "exp_avg_var": "square", "max_exp_avg_var": "square"}
_TIMM: dict[str, dict[str, Follow]] = {
    "adafactor.Adafactor": _ADAM,
    "adafactor_bv.AdafactorBigVision": _ADAM,
    "adabelief.AdaBelief": _BELIEF,
    "adamp.AdamP": _ADAM,
    "adamw.AdamWLegacy": _ADAM,
    "lamb.Lamb": _ADAM,
    "lion.Lion": _ADAM,
    "muon.Muon": {"momentum_buffer": "linear", **_ADAM},
    "nadam.NAdamLegacy": _ADAM,
    "nadamw.NAdamW": _ADAM,
    "radam.RAdamLegacy": _ADAM,
    "rmsprop_tf.RMSpropTF": _RMSPROP,
    "sgdp.SGDP": {"momentum": "linear"},
    "sgdw.SGDW": {"momentum_buffer": "linear"},
}


def _start_adagrad(parameter: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
    device = parameter.device if group.get("fused") else None
    total = torch.full_like(parameter, group["initial_accumulator_value"])
    return {"step": torch.zeros((), dtype=torch.float32, device=device), "sum": total.detach()}


optimizer_rule(optim.SGD, {"momentum_buffer": "linear"})
optimizer_rule(optim.Adam, _ADAM)
optimizer_rule(optim.AdamW, _ADAM)
optimizer_rule(optim.RMSprop, _RMSPROP)
optimizer_rule(optim.Adagrad, {"sum": "square"}, start=_start_adagrad)
optimizer_rule(optim.RAdam, _ADAM)
optimizer_rule(optim.NAdam, _ADAM)
optimizer_rule(optim.Adamax, {"exp_avg": "linear", "exp_inf": "size"})
optimizer_rule(optim.Muon, {"momentum_buffer": "linear"})
# The factored moments of matrices (row_var, col_var) have no rule: rows and columns of a grown weight are others.
optimizer_rule(optim.Adafactor, {"variance": "square"})

for _name, _moments in _TIMM.items():
    optimizer_rule(f"timm.optim.{_name}", _moments)
optimizer_rule("transformers.optimization.Adafactor", _ADAM)
optimizer_rule("lion_pytorch.lion_pytorch.Lion", _ADAM)
