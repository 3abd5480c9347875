"""Attention that PyTorch runs as one operator, followed as the products and the softmax that it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmorph.graph.flow import DATA, Flow
from fastmorph.graph.tracer import Call, Tracer

FUSED = (
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_fused_attention_overrideable",),
)
_ATEN = torch.ops.aten


def attention(tracer: Tracer, call: Call) -> list[Flow]:
    """softmax(q k^T * scale + mask) v, (*, L, Ev), of query (*, L, E), key (*, S, E) and value (*, S, Ev); and (*, L), of what
    the softmax divides by.
    """
    query, key, value = (call[name] for name in ("query", "key", "value"))
    scale = call["scale"] if call.args.get("scale") is not None else query.shape[-1] ** -0.5
    tracer.note(call.name, scale, call["dropout_p"], call["is_causal"])
    repeats = query.shape[-3] // key.shape[-3] if query.ndim > 3 else 1
    if repeats > 1:  # query heads share keys and values
        heads = query.shape[:-2]
        key, value = (
            _step(tracer, _ATEN.repeat_interleave.self_int, (*heads, *tensor.shape[-2:]), tensor, repeats, -3)
            for tensor in (key, value)
        )
    turned = _step(tracer, _ATEN.transpose.int, (*key.shape[:-2], key.shape[-1], key.shape[-2]), key, -2, -1)
    shape = (*query.shape[:-1], key.shape[-2])
    scores = _step(tracer, _ATEN.matmul.default, shape, query, turned)
    mask = call.args.get("attn_mask", call.args.get("attn_bias"))
    if mask is not None:
        scores = _step(tracer, _ATEN.add.Tensor, shape, scores, mask)
    if call["is_causal"]:
        causal = torch.empty(shape[-2:], device="meta")
        tracer.set(causal, DATA)
        scores = _step(tracer, _ATEN.add.Tensor, shape, scores, causal)
    weights = _step(tracer, _ATEN._safe_softmax.default, shape, scores, -1)
    if call["dropout_p"]:
        weights = _step(tracer, _ATEN.dropout.default, shape, weights, call["dropout_p"], True)
    found = tracer.flow(_step(tracer, _ATEN.matmul.default, (*shape[:-1], value.shape[-1]), weights, value))
    divisors = call.outputs[1:2]
    if not divisors or divisors[0].shape != shape[:-1]:
        return [found]
    return [found, Flow(tuple(slot[..., 0] for slot in tracer.flow(weights).slots))]


def _step(tracer: Tracer, func: Any, shape: tuple[int, ...], *args: Any) -> Tensor:
    """Follow an operator without running it; a tensor of that shape stands for its result."""
    out = torch.empty(shape, device="meta")
    tracer.follow(func, args, {}, out)
    return out
