"""What a pair of kernels leaves of a weight, and its squared norm."""

from .op import residual

__all__ = ["residual"]
