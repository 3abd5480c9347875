"""The adjoint of the composition."""

from .op import correlate

__all__ = ["correlate"]
