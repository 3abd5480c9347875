"""Gathers and scales the entries of many weights."""

from .op import move

__all__ = ["move"]
