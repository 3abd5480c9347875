"""Streams of channels that norms read, at any width: `algebra` says what is done, `read` does it."""
