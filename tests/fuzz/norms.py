"""More pieces: norms of all kinds, over everything, over one chunk, in float32; and attention."""

from __future__ import annotations

import torch

from tests.fuzz.pieces import ANY, PIECES, piece
from tests.fuzz.source import Source, race


def _channels_last(net: Source, module: str) -> str:
    """`module` over the channels of `h`, wherever they are."""
    return f"{module}(h.movedim(1, -1)).movedim(-1, 1)" if net.kind == "map" else f"{module}(h)"


def _norm(net: Source, channels: int) -> str:
    """A norm module on a value that has so many channels where `h` has its own."""
    made = [f"nn.GroupNorm({net.divisor(channels)}, {channels})"] * 2 if net.kind != "tokens" else []
    if net.kind == "map":
        made += [f"nn.InstanceNorm{net.dims}d({channels}, affine={net.chance(0.5)}, track_running_stats={net.chance(0.3)})"]
    made += [f"nn.LayerNorm({channels})", f"nn.RMSNorm({channels})"] if net.kind != "map" else []
    made += [f"nn.BatchNorm{max(1, net.dims)}d({channels})"] * 2 if net.kind != "tokens" else []
    return net.make("norm", net.pick(*made))


@piece("map", "vector", weight=2.5)
def batch_norm(net: Source) -> None:
    affine = ", affine=False" * net.chance(0.2) + ", track_running_stats=False" * net.chance(0.1)
    net.step(f"{net.make('norm', f'nn.BatchNorm{max(1, net.dims)}d({net.channels}{affine})')}(h)")


@piece("map", "vector", weight=2)
def group_norm(net: Source) -> None:
    affine = ", affine=False" * net.chance(0.3)
    net.step(f"{net.make('norm', f'nn.GroupNorm({net.divisor(net.channels)}, {net.channels}{affine})')}(h)")


@piece("map", weight=0.7)
def instance_norm(net: Source) -> None:
    net.step(f"{net.make('norm', f'nn.InstanceNorm{net.dims}d({net.channels}, affine={net.chance(0.5)})')}(h)")


@piece(*ANY, weight=2)
def layer_norm(net: Source) -> None:
    options = f", elementwise_affine={net.chance(0.7)}" if net.chance(0.4) else ""
    module = net.make("norm", f"nn.{net.pick('LayerNorm', 'LayerNorm', 'RMSNorm')}({net.channels}{options})")
    net.step(_channels_last(net, module))


@piece("map", weight=0.7)
def whole_layer_norm(net: Source) -> None:
    net.step(f"{net.make('norm', f'nn.LayerNorm({list(net.shape[1:])})')}(h)")


@piece(*ANY, weight=2)
def handwritten_norm(net: Source) -> None:
    axis = net.axis
    mean, square = f"h.mean({axis}, keepdim=True)", f"h.square().mean({axis}, keepdim=True)"
    options = [f"h - {mean}", f"h * torch.rsqrt({square} + 1e-5)", f"(h - {mean}) / h.std({axis}, keepdim=True).add(1e-3)"]
    options += [f"F.normalize(h, dim={axis})", f"h / (1 + h.norm(dim={axis}, keepdim=True))"]
    net.step(net.pick(*options))


@piece(*ANY, weight=2.5)
def norm_of_chunk(net: Source) -> None:
    k, axis = net.int(1, net.channels - 1), net.axis
    k = net.channels // 2 if net.chance(0.5) else k
    net.let(f"a, b = h.split([{k}, {net.channels - k}], {axis})")
    correction = "" if k > 1 else ", correction=0"  # one value has no other variance
    written = f"(a - a.mean({axis}, keepdim=True)) * torch.rsqrt(a.var({axis}, keepdim=True{correction}) + 1e-5)"
    normed = written if net.chance(0.3) else f"{_norm(net, k)}(a)"
    net.step(f"torch.cat([{net.pick(f'{normed}, b', f'b, {normed}')}], {axis})")


@piece(*ANY, weight=5)
def norm_of_mixture(net: Source) -> None:
    few, c = net.int(2, 5), net.channels
    layer = net.layer(few)
    net.step(f"{_norm(net, c + few)}(torch.cat([h, F.relu({layer}(h))], {net.axis}))")


@piece(*ANY)
def softmax(net: Source) -> None:
    island = net.chance(0.5)
    net.step(f"torch.softmax(h.float(), {net.axis}).to(h.dtype)" if island else f"torch.softmax(h, {net.axis})")
    net.grain = torch.float32 if island and net.grain == torch.float64 else net.grain


@piece(*ANY)
def float32_norm(net: Source) -> None:
    module = net.make("norm", f"nn.{net.pick('LayerNorm', 'RMSNorm')}({net.channels})")
    back = ".movedim(-1, 1)" if net.kind == "map" else ""
    given = "h.movedim(1, -1)" if net.kind == "map" else "h"
    net.let(f"r = {given}.float()")
    net.step(f"(r * torch.rsqrt(r.square().mean(-1, keepdim=True) + 1e-5)).to(h.dtype).mul({module}.weight){back}")
    net.grain = torch.float32 if net.grain == torch.float64 else net.grain


@piece("map", "vector", weight=0.7)
def channel_buffer(net: Source) -> None:
    shape = (net.channels,) + (1,) * net.dims
    net.write(f"self.register_buffer('scale{net.slot}', torch.ones{shape if net.dims else f'({net.channels})'})")
    net.step(f"h * self.scale{net.slot}")


# --- attention ----------------------------------------------------------------------------------------------------------------


@piece("tokens", weight=1.5)
def multihead_attention(net: Source) -> None:
    heads = net.divisor(net.channels)
    made = f"nn.MultiheadAttention({net.channels}, {heads}, batch_first=True{', bias=False' * net.chance(0.3)})"
    net.step(f"{net.pick('', 'h + ')}{net.make('attention', made)}(h, h, h, need_weights={net.chance(0.5)})[0]")


@piece("tokens", weight=1.5)
def scaled_attention(net: Source) -> None:
    heads, per = net.int(1, 2), net.int(1, 3)
    projections = [net.layer(heads * per) for _ in range(3)]
    for name, layer in zip("qkv", projections, strict=True):
        net.let(f"{name} = {layer}(h).unflatten(2, ({heads}, -1)).transpose(1, 2)")
    net.let("o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)")
    net.step(f"h + {net.layer(net.channels, inputs=heads * per)}(o)")


@piece("tokens")
def fused_attention(net: Source) -> None:
    heads, per = net.int(1, 2), net.int(1, 3)
    net.let(f"q, k, v = {net.layer(3 * heads * per)}(h).unflatten(2, (3, {heads}, -1)).permute(2, 0, 3, 1, 4)")
    net.let("o = (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2).flatten(2)")
    net.step(f"h + {net.layer(net.channels, inputs=heads * per)}(o)")


@piece("tokens", weight=0.7)
def encoder_layer(net: Source) -> None:
    heads, wide = net.divisor(net.channels), net.int(3, 8)
    options = f"{wide}, 0.0, batch_first=True, norm_first={net.chance(0.5)}"
    net.step(f"{net.make('encoder', f'nn.TransformerEncoderLayer({net.channels}, {heads}, {options})')}(h)")


# --- between two layers -------------------------------------------------------------------------------------------------------


@piece(*ANY, weight=12)
def between_layers(net: Source) -> None:
    """Any other piece between a layer of few weights and one of many: new channels are made, meet the piece, and are read."""
    fitting = {name: weight for name, (_, kinds, weight) in PIECES.items() if net.kind in kinds and name != "between_layers"}
    net.step(f"{net.make('narrow', net.layer_code(net.int(2, 5), 1))}(h)")
    PIECES[race(f"{net.seed}.{net.slot}.between", fitting)][0](net)
    net.step(f"{net.layer(net.int(4, 8))}(h)")
