"""The errors that fastmorph raises; each message says what is wrong, why, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmorph.decomposition import Decomposition


class MorphError(ValueError):
    """A morph was refused: the input is unusable, or what was asked for cannot be exact."""


class InexactMorphError(MorphError):
    """A solver ran and its answer is not exact; `decomposition` carries that answer."""

    def __init__(self, message: str, decomposition: Decomposition) -> None:
        super().__init__(message)
        self.decomposition = decomposition
