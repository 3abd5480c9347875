"""Which layers of a model share channels, found by running it once without computing anything."""

from fastmorph.graph.coupled import Coupled, coupled

__all__ = ["Coupled", "coupled"]
