"""The memory of Anderson acceleration."""

from .op import anderson_gram, anderson_update

__all__ = ["anderson_gram", "anderson_update"]
