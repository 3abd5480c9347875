"""With all that these models compute in float32 computed in float64, growth is exact to float64's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_grow import CASES, LLAMA, call_of, error, made
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastmorph as fm

CASES.setdefault(
    "gemma3", ("Gemma3TextConfig", "Gemma3ForCausalLM", LLAMA | {"head_dim": 4, "sliding_window": 4, "num_key_value_heads": 2})
)
INSIDE = {"intermediate_size": 17, "num_hidden_layers": 3}
GROWN = {
    "llama": INSIDE | {"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma3": INSIDE | {"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt2": {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 3},
}


class Wide(TorchFunctionMode):
    """Norms, softmax and positions of transformers, which ask for float32, get float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        kwargs = {key: wider(value) for key, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*map(wider, args), **kwargs)


def outputs(model: Any, call: Any) -> Tensor:
    """Logits, with factors that a model keeps in float32 taken from its width anew."""
    for module in model.modules():
        if "embed_scale" in module._buffers:
            module.embed_scale = torch.tensor(model.config.hidden_size, dtype=torch.float64).sqrt()
    with torch.no_grad(), Wide():
        found: Tensor = model(**call).logits
    assert found.dtype == torch.float64
    return found


@pytest.mark.parametrize("name", GROWN)
def test_growth_is_exact_in_float64(name):
    parent, call = made(name).double(), call_of(name)
    child = fm.transformers.grow(parent, **GROWN[name], generator=0, verify=False).model
    assert child.config.hidden_size == GROWN[name]["hidden_size"]
    wanted = outputs(parent, call)
    with torch.no_grad():
        assert name == "gpt2" or error(parent(**call).logits, wanted) > 1e-10  # there are islands
    # At most 3 blocks of some 10 products of 24 to 100 terms: a few hundred roundings of 1.1e-16, none larger than 1e3 of them.
    assert error(outputs(child, call), wanted) < 1e-12
