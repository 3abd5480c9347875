"""The composition of two convolution kernels."""

from .op import compose

__all__ = ["compose"]
