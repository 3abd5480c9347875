"""Pooling, resizing and padding by reflection: along space, channel by channel."""

from __future__ import annotations

from fastmorph.graph.flow import Flow
from fastmorph.graph.tracer import Call, Tracer

_NAMES = (
    *("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool"),
    *("reflection_pad", "replication_pad", "upsample_nearest", "_upsample_nearest_exact", "max_unpool"),
)
SPATIAL = (
    *(f"{name}{dims}d" for dims in (1, 2, 3) for name in _NAMES),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
    *("upsample_trilinear3d", "grid_sampler_2d", "grid_sampler_3d"),
)


def spatial(tracer: Tracer, call: Call) -> list[Flow]:
    """(N, C, *) -> (N, C, *'), or without N."""
    x, *others = call.tensors
    outs = call.out if isinstance(call.out, tuple | list) else [call.out]
    dims = range(-next(int(digit) for digit in call.name if digit in "123"), 0)
    tracer.note(call.name, *map(str, call.numbers))
    tracer.block([slot for other in others for slot in tracer.flow(other).slots], "takes positions from them")
    flow = tracer.flow(x)
    slots = []
    for slot in flow.slots:
        if any(slot.shape[dim] > 1 for dim in dims):
            tracer.block([slot], "slides a window along them")
        else:
            slots.append(slot)
    return [Flow(tuple(slots), flow.opaque)] * len(outs)
