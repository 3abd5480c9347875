"""The namespace of the operators, `torch.ops.fastmorph_kernels`; a package for the Hub has a file of its own in this place.

There it is another namespace for each version and device, so that several versions live in one process.
"""

from __future__ import annotations


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operator."""
    return f"fastmorph_kernels::{name}"
