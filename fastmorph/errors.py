"""The error that fastmorph raises; its message says what is wrong, why, and what to do about it."""


class MorphError(ValueError):
    """A morph was refused: the input is unusable, or what was asked for cannot be exact."""
