"""JAX's arrays by DLPack: they come back as they went in, and inside a transformation a sentence says why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmorph as fm

jax = pytest.importorskip("jax", reason="jax is not installed (requirements-others.txt)")


@pytest.mark.filterwarnings("ignore")
def test_arrays_come_back_as_jax_arrays():
    weight = jax.numpy.asarray(np.random.default_rng(0).standard_normal((4, 3, 5, 5), dtype=np.float32))
    answer = fm.decompose(weight, 24, generator=0)
    assert isinstance(answer.first, jax.Array)
    again = fm.compose(answer.first, answer.second)
    assert isinstance(again, jax.Array)
    error = float(jax.numpy.linalg.norm(again - weight) / jax.numpy.linalg.norm(weight))
    assert error <= fm.tolerance(torch.float32)
    half = fm.decompose(weight.astype(jax.numpy.bfloat16), 24, generator=0)
    assert half.first.dtype == jax.numpy.bfloat16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_inside_a_transformation_it_says_to_call_it_outside(transform):
    weight = jax.numpy.ones((2, 4, 3, 3, 3))[0 if transform != "vmap" else slice(None)]

    def inside(weight):
        return fm.decompose(weight, 16, generator=0).first.sum()

    with pytest.raises(fm.MorphError, match="Inside jit, grad or vmap"):
        getattr(jax, transform)(inside)(weight)
