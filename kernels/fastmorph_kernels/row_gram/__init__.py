"""The Gram matrix of a half-step's rows."""

from .op import row_gram

__all__ = ["row_gram"]
