"""Triton kernels for the morphism equation, as PyTorch operators; they know nothing of models."""

from .ops import Precision, compose

__all__ = ["Precision", "compose"]
