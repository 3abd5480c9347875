"""Triton kernels for the morphism equation, as PyTorch operators; they know nothing of models."""

from .anderson_op import anderson_gram, anderson_push, anderson_update, anderson_update_with_squares
from .compose_op import compose
from .correlate_op import correlate
from .direct_op import direct
from .factor_op import cholesky, cholesky_preferred, cholesky_solve
from .gram_op import column_gram, row_gram
from .moves_op import move
from .residual_op import residual, residual_norm
from .support import Precision

__all__ = [
    "Precision",
    "anderson_gram",
    "anderson_push",
    "anderson_update",
    "anderson_update_with_squares",
    "cholesky",
    "cholesky_preferred",
    "cholesky_solve",
    "column_gram",
    "compose",
    "correlate",
    "direct",
    "move",
    "residual",
    "residual_norm",
    "row_gram",
]
