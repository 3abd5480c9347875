"""The closed form of the morphism equation."""

from .op import direct

__all__ = ["direct"]
