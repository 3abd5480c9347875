"""The equation alone, on arrays of any library: numpy in, numpy out; JAX in, JAX out (by DLPack)."""

import importlib.util

import numpy as np

import fastmorph as fm

weight = np.random.default_rng(0).standard_normal((32, 16, 5, 5)).astype(np.float32)
answer = fm.decompose(weight, hidden_channels=48, kernel_sizes=(3, 3), generator=0)
print(f"numpy: {type(answer.first).__name__} {answer.first.shape} and {answer.second.shape}, residual {answer.residual:.1e}")
assert np.abs(fm.compose(answer.first, answer.second) - weight).max() < 1e-4

if importlib.util.find_spec("jax"):
    import jax.numpy as jnp

    answer = fm.decompose(jnp.asarray(weight), hidden_channels=48, kernel_sizes=(3, 3), generator=0)
    print(f"JAX: {type(answer.first).__name__} {answer.first.shape} and {answer.second.shape}, residual {answer.residual:.1e}")
else:
    print("JAX is not installed: its arrays would come back as JAX arrays in the same way.")
