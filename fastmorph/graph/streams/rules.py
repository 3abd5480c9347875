"""Which operator has which rule."""

from __future__ import annotations

from fastmorph.graph.rules import move
from fastmorph.graph.streams import along, moves, pointwise, products
from fastmorph.graph.streams.walk import Rule

_THROUGH_ZERO = (
    *("relu6", "elu", "celu", "selu", "silu", "gelu", "mish", "hardswish", "tanh", "sign", "softshrink", "hardshrink", "erf"),
    *("sin", "asinh", "atan", "sinh", "tan", "expm1", "log1p", "trunc", "round", "ceil", "floor"),
)
_ALONG_SPACE = (
    *(f"{name}{dims}d" for dims in (1, 2, 3) for name in ("avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool")),
    *(f"{name}{dims}d" for dims in (1, 2, 3) for name in ("upsample_nearest", "_upsample_nearest_exact")),
    *("upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_THROUGH_ZERO, pointwise.keeps_zero),
    **dict.fromkeys((*move.KEEP, *move.MOVE), moves.moved),
    **dict.fromkeys(("add", "sub"), pointwise.add),
    **dict.fromkeys(("mul", "div"), pointwise.mul),
    **dict.fromkeys(("relu", "abs", "leaky_relu"), pointwise.homogeneous),
    **{
        "neg": pointwise.negated,
        "pow": pointwise.pow_,
        "square": pointwise.of_power(2.0),
        "sqrt": pointwise.of_power(0.5),
        "rsqrt": pointwise.of_power(-0.5),
        "reciprocal": pointwise.of_power(-1.0),
    },
    **dict.fromkeys(("mean", "sum"), along.mean),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), along.variance),
    **dict.fromkeys(("norm", "linalg_vector_norm"), along.length),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"), along.layer_norm),
    **dict.fromkeys(("mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "matmul"), products.matrix_product),
    **{
        "convolution": products.convolution,
        "embedding": products.embedding,
        "cat": moves.joined,
        "stack": moves.joined,
        "where": moves.chosen,
        "index_add": moves.added_at,
    },
    **dict.fromkeys(("index", "index_select"), moves.looked_up),
    **{"masked_fill": moves.masked, "copy": moves.copied, "zeros_like": moves.zeros_like, "new_zeros": moves.zeros_like},
    **dict.fromkeys(("native_dropout", "dropout"), moves.dropped_out),
    **dict.fromkeys(_ALONG_SPACE, moves.resized),
}
