"""The Gram matrix of a half-step's columns."""

from .op import column_gram

__all__ = ["column_gram"]
