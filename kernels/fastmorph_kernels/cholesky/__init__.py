"""Cholesky factors of many matrices, and solves with them."""

from .op import cholesky, cholesky_preferred, cholesky_solve

__all__ = ["cholesky", "cholesky_preferred", "cholesky_solve"]
