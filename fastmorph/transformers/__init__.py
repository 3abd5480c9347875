"""Recipes for models of Hugging Face's transformers: grown in one line, saved and loaded by their stock class.

Their package is needed for the models themselves, and imported when it is used.
"""

from fastmorph.transformers.checkpoint import grow_checkpoint
from fastmorph.transformers.grow import grow
from fastmorph.transformers.recipe import recipe

__all__ = ["grow", "grow_checkpoint", "recipe"]
