"""Further pieces: weights that are computed or of extreme size, and what treats a channel by its number."""

from __future__ import annotations

import torch

from tests.fuzz.pieces import ANY, piece
from tests.fuzz.source import Source

# --- weights ------------------------------------------------------------------------------------------------------------------


@piece(*ANY, weight=1.5)
def computed_weight(net: Source) -> None:
    """What a hook or a parametrization computes; a spectral norm computes another one in train mode."""
    made = net.pick("weight_norm({})", "utils.weight_norm({})", "spectral_norm({})", "utils.spectral_norm({})")
    if "spectral" in made and net.mode != "eval":
        made = "weight_norm({})"
    net.step(f"{net.make('computed', made.format(net.layer_code(net.int(2, 8))))}(h)")


@piece(*ANY)
def scaled_weight(net: Source) -> None:
    """Weights whose squares are no numbers any more, and what undoes it."""
    power = net.pick(-1, 1) * (560 if net.dtype == torch.float64 else 90)
    layer = net.layer(net.int(2, 6), bias=False)
    net.write(f"{layer}.weight.power = {power}")
    net.step(f"{layer}(h) * 2.0 ** {-power}")


@piece("tokens", weight=0.5)
def recurrent(net: Source) -> None:
    made = net.make("recurrent", f"nn.{net.pick('LSTM', 'GRU')}({net.channels}, {net.int(2, 5)}, batch_first=True)")
    net.step(f"{made}(h)[0]")


# --- by number ----------------------------------------------------------------------------------------------------------------


@piece(*ANY)
def numbered(net: Source) -> None:
    shape = [1] * len(net.shape)
    shape[net.axis] = -1
    numbers = f"torch.arange(h.shape[{net.axis}]).view({shape})"
    net.step(
        net.pick(f"h * {numbers}", f"h + {numbers} / 7", f"torch.where({numbers} % 2 == 0, h, -h)", f"h.cumsum({net.axis})")
    )


@piece("map", "vector")
def sliced(net: Source) -> None:
    k = net.int(1, net.channels - 1)
    net.step(net.pick(f"h[:, {k}:]", f"h[:, :{k}]", f"h[:, -{k}:]", "h[:, ::2]", "h[:, h.shape[1] // 2 :]", f"h[:, [0, {k}]]"))


@piece("map", "vector")
def repeated(net: Source) -> None:
    options = [f"h.repeat(1, 2{', 1' * net.dims})", "h.repeat_interleave(2, 1)", "torch.stack([h, -h], 1).flatten(1, 2)"]
    net.step(net.pick(*options, "torch.stack([h, h.tanh()], 2).flatten(1, 2)"))


@piece(*ANY)
def sorted_channels(net: Source) -> None:
    axis = net.axis
    net.step(net.pick(f"h.sort({axis})[0]", f"h.topk(1, {axis})[0]", f"h - h.median({axis}, keepdim=True)[0]"))


@piece("map", "vector")
def written_in_place(net: Source) -> None:
    k = net.int(1, net.channels - 1)
    net.let("h = h.clone()")
    net.let(
        net.pick(f"h[:, :{k}] = 0.5", f"h[:, {k}:] += 1", f"h[:, :{k}].relu_()", "h.mul_(h.sigmoid())", "h[:, 0] = h[:, -1]")
    )


@piece("map", "tokens")
def gram(net: Source) -> None:
    """Channels, or positions, against each other."""
    if net.kind == "tokens":
        net.step(net.pick("torch.softmax(h @ h.transpose(1, 2), -1) @ h", "h @ h.transpose(1, 2) @ h / h.shape[1]"))
    else:
        net.step("torch.einsum('bc...,bd...->bcd', h, h)", "tokens")
