"""Layers and optimizers of timm, where it is installed."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

from bench.zoo.models import declare_torchvision_operators, missing


def timm_part(module: str, name: str) -> Any:
    """An attribute of a module of timm's, "layers.std_conv" say; skips the test without timm."""
    if missing("timm"):
        pytest.skip("timm is not installed (requirements-zoo.txt)")
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"timm.{module}"), name)
