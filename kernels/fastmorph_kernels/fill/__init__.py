"""Writes the entries of many grown tensors."""

from .op import fill
from .table import BITS, CONSTANT, DRAWN, MIRRORED, OLD, Dimension

__all__ = ["BITS", "CONSTANT", "DRAWN", "MIRRORED", "OLD", "Dimension", "fill"]
