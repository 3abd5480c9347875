"""Grown networks on disk: `save` and `load`."""
