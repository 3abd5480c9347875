"""The error that fastmorph raises; its message says what is wrong, why, and what to do about it."""

from __future__ import annotations


class MorphError(ValueError):
    """A morph was refused: the input is unusable, or what was asked for cannot be exact.

    Attributes:
        problem: in an error of `decompose_many`, the index of the problem that it is about; else None.
        inner: in such an error, the error of that problem alone, which does not name the index.
    """

    problem: int | None = None
    inner: MorphError | None = None

    def within(self, place: str) -> MorphError:
        """The same error, its message headed by the place where it was met."""
        return MorphError(f"{place}: {self}")

    def of_problem(self, index: int) -> MorphError:
        """The same error, met in a problem of a list."""
        error = self.within(f"problem {index}")
        error.problem, error.inner = index, self
        return error
