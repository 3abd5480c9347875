"""The middle of a network: pieces that read `h` and write a new `h`. Each is one thing that people write between two layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.fuzz.source import Source

Piece = Callable[[Source], None]
PIECES: dict[str, tuple[Piece, tuple[str, ...], float]] = {}
ANY = ("map", "tokens", "vector")


def piece(*kinds: str, weight: float = 1.0) -> Callable[[Piece], Piece]:
    """Register a piece for kinds of `h`."""

    def register(function: Piece) -> Piece:
        PIECES[function.__name__] = (function, kinds, weight)
        return function

    return register


# --- layers -------------------------------------------------------------------------------------------------------------------


@piece("map", weight=4)
def convolution(net: Source) -> None:
    groups = net.divisor(net.channels) if net.chance(0.25) else 1
    co = groups * net.int(1, 3) if groups > 1 else net.int(2, 8)
    options = [f"{net.channels}, {co}", str(net.pick(1, 2, 3, 3, 3, tuple(net.int(1, 3) for _ in range(net.dims))))]
    options += [f"stride={net.int(1, 2)}"] * net.chance(0.25) + [f"dilation={net.int(1, 2)}"] * net.chance(0.2)
    options += [f"groups={groups}"] * (groups > 1) + ["bias=False"] * net.chance(0.3)
    padding = net.pick(0, 1, 1, 2, "same", tuple(net.int(0, 2) for _ in range(net.dims)))
    options += [f"padding={padding!r}"] * net.chance(0.8)
    options += [f"padding_mode={net.pick('reflect', 'replicate', 'circular')!r}"] * net.chance(0.2)
    made = ", ".join(options)
    net.step(f"{net.make('conv', f'nn.Conv{net.dims}d({made})')}(h)")


@piece("map", weight=1.5)
def depthwise(net: Source) -> None:
    c, times = net.channels, net.int(1, 2)
    net.step(f"{net.make('conv', f'nn.Conv{net.dims}d({c}, {c * times}, 3, padding=1, groups={c})')}(h)")


@piece("map", weight=1.5)
def transposed(net: Source) -> None:
    options = f", stride={net.int(1, 2)}, padding={net.int(0, 1)}" + ", bias=False" * net.chance(0.3)
    net.step(
        f"{net.make('conv', f'nn.ConvTranspose{net.dims}d({net.channels}, {net.int(2, 6)}, {net.int(2, 3)}{options})')}(h)"
    )


@piece("tokens", "vector", weight=3)
def linear(net: Source) -> None:
    net.step(f"{net.layer(net.int(2, 8))}(h)")


@piece("map", "tokens")
def weight_normed(net: Source) -> None:
    net.step(f"{net.make('normed', f'weight_norm({net.layer_code(net.int(2, 8))})')}(h)")


@piece("vector")
def bilinear(net: Source) -> None:
    net.step(f"{net.make('bilinear', f'nn.Bilinear({net.channels}, {net.channels}, {net.int(2, 6)})')}(h, F.relu(h))")


@piece("map", weight=0.7)
def mixing_parameter(net: Source) -> None:
    mixing = net.parameter("mixing", net.int(2, 6), net.channels)
    net.step(f"torch.einsum('bc...,dc->bd...', h, {mixing})")


@piece("map", "tokens", "vector", weight=0.7)
def bfloat16_part(net: Source) -> None:
    layer = net.layer(net.int(2, 6), 1)
    net.write(f"{layer}.bfloat16()")
    net.step(f"{layer}(h.bfloat16()).to(h.dtype)")
    net.grain = torch.bfloat16


@piece(*ANY, weight=0.7)
def hooked(net: Source) -> None:
    layer = net.layer(net.int(2, 6))
    net.write(f"{layer}.register_forward_hook(doubled)")
    net.step(f"{layer}(h)")


# --- elementwise, and what is only nearly so ----------------------------------------------------------------------------------


@piece(*ANY, weight=3)
def activation(net: Source) -> None:
    net.step(net.pick("F.relu(h)", "F.gelu(h)", "torch.tanh(h)", "F.silu(h)", "torch.sigmoid(h)", "h * h", "F.softplus(h)"))


@piece("map", "vector", weight=0.5)
def prelu(net: Source) -> None:
    net.step(f"{net.make('prelu', f'nn.PReLU({net.channels})')}(h)")


@piece(*ANY, weight=1.5)
def constant(net: Source) -> None:
    net.step(net.pick("h + torch.ones_like(h)", "h + 1", "2 - h", "h * torch.full_like(h, 0.5) + 0.25"))


@piece("map", weight=2)
def constant_padding(net: Source) -> None:
    widths = tuple(net.int(0, 2) for _ in range(2 * net.dims))
    net.step(f"F.pad(h, {widths}, value=0.5)" if net.chance(0.7) else f"nn.ConstantPad{net.dims}d(1, 1.0)(h)")


@piece(*ANY)
def channel_parameter(net: Source) -> None:
    shape = (net.channels,) if net.axis == len(net.shape) - 1 else (net.channels,) + (1,) * net.dims
    net.step(f"h {net.pick('+', '*')} {net.parameter('scale', *shape)}")


@piece("map", "tokens", weight=2)
def spatial_parameter(net: Source) -> None:
    shape = (1, *net.shape[2:]) if net.kind == "map" else (net.shape[1], 1)
    net.step(f"h {net.pick('+', '*')} {net.parameter('position', *shape)}")


@piece("map", "tokens", weight=2)
def single_channel(net: Source) -> None:
    mask = f"{net.layer(1, 1)}(h)"
    net.step(net.pick(f"h + {mask}", f"h * torch.sigmoid({mask})", f"{mask} + F.relu(h)"))


@piece("map", "tokens")
def channel_statistic(net: Source) -> None:
    one = net.pick("mean({}, keepdim=True)", "amax({}, keepdim=True)", "sum({}, keepdim=True)", "std({}, keepdim=True)")
    net.step(f"h {net.pick('+', '-', '*')} h.{one.format(net.axis)}")


@piece("map", "tokens", weight=2)
def mixed_positions(net: Source) -> None:
    if net.kind == "map":
        flat = math.prod(net.shape[2:])
        net.step(f"{net.make('mix', f'nn.Linear({flat}, {flat})')}(h.flatten(2)).view_as(h)")
    else:
        length = net.shape[1]
        net.step(f"{net.make('mix', f'nn.Linear({length}, {length})')}(h.transpose(1, 2)).transpose(1, 2)")


# --- how channels are coupled -------------------------------------------------------------------------------------------------


@piece(*ANY, weight=2)
def residual(net: Source) -> None:
    net.step(f"h + {net.layer(net.channels)}(F.relu(h))")


@piece(*ANY, weight=2)
def residual_block(net: Source) -> None:
    first = net.layer(net.int(2, 8))
    hidden = net.values["self"].get_submodule(first.removeprefix("self.")).weight.shape[0]
    second = net.layer(net.channels, inputs=hidden)
    net.step(f"h + {second}(F.relu({first}(h)))")


@piece(*ANY, weight=2)
def concatenation(net: Source) -> None:
    branch = f"F.relu({net.layer(net.int(1, 5))}(h))"
    net.step(f"torch.cat([{net.pick(f'h, {branch}', f'{branch}, h', f'h, {branch}, 2 * h')}], {net.axis})")


@piece("map", "vector")
def constant_channels(net: Source) -> None:
    net.step(f"torch.cat([h, torch.{net.pick('ones', 'zeros')}_like(h[:, :{net.int(1, 2)}])], 1)")


@piece(*ANY)
def gate(net: Source) -> None:
    if net.chance(0.5) and net.channels % 2 == 0:
        net.let(f"a, b = h.chunk(2, {net.axis})")
        net.step("a * torch.sigmoid(b)")
    else:
        c = net.int(2, 6)
        net.step(f"{net.layer(c)}(h) * torch.sigmoid({net.layer(c, 1)}(h))")


@piece("map")
def squeeze_excite(net: Source) -> None:
    c, few, over = net.channels, net.int(1, 3), tuple(range(2, len(net.shape)))
    first, second = net.make("linear", f"nn.Linear({c}, {few})"), net.make("linear", f"nn.Linear({few}, {c})")
    net.let(f"s = torch.sigmoid({second}(F.relu({first}(h.mean({over})))))")
    net.step(f"h * s[(...,) + (None,) * {net.dims}]")


@piece("map", "vector")
def split(net: Source) -> None:
    k = net.int(1, net.channels - 1)
    net.let(f"a, b = h.split([{k}, {net.channels - k}], 1)")
    net.step(net.pick("torch.cat([b, a], 1)", "torch.cat([F.relu(a), b], 1)", "torch.cat([a, b.tanh(), a], 1)"))


@piece("map")
def shuffle(net: Source) -> None:
    groups = net.divisor(net.channels)
    options = [f"h.unflatten(1, ({groups}, -1)).transpose(1, 2).flatten(1, 2)", "h.flip(1)", "h.roll(1, 1)"]
    options += [f"nn.ChannelShuffle({groups})(h)"] + ["nn.PixelShuffle(2)(h)", "nn.PixelUnshuffle(1)(h)"] * (net.dims == 2)
    net.step(net.pick(*options))


@piece(*ANY)
def shared_module(net: Source) -> None:
    layer = net.layer(net.channels)
    net.step(f"{layer}(F.relu({layer}(h)))")


@piece(*ANY, weight=0.5)
def tied_weights(net: Source) -> None:
    first, second = net.layer(net.channels), net.layer(net.channels)
    net.write(f"{first}.weight = {second}.weight")
    net.step(f"{first}(F.relu({second}(h)))")


# --- a forward that reads its layers, or sizes --------------------------------------------------------------------------------


@piece(*ANY, weight=1)
def read_weight(net: Source) -> None:
    layer = net.layer(net.int(2, 6))
    read = net.pick(
        "weight.norm()", "weight.std()", "weight.square().mean()", "weight.abs().amax()", "out_{0}", "weight.shape[0]"
    )
    read = read.format("channels" if net.dims else "features")
    net.step(f"{layer}(h) {net.pick('*', '/')} (1 + {layer}.{read})")


@piece("map")
def read_padding(net: Source) -> None:
    layer = net.make("conv", f"nn.Conv{net.dims}d({net.channels}, {net.int(2, 6)}, 3, padding=2)")
    net.step(f"{layer}(h)[..., :-{layer}.padding[0]]")


@piece("map", "vector", "tokens", weight=0.7)
def functional_call(net: Source) -> None:
    layer = net.layer(net.channels if net.chance(0.5) else net.int(2, 6))
    call = f"F.conv{net.dims}d(h, {layer}.weight)" if net.dims else f"F.linear(h, {layer}.weight)"
    both = net.dims == 0 or net.chance(0.5)
    net.step(f"{call} + {layer}(h)" if both and not net.dims else call)


@piece(*ANY)
def read_size(net: Source) -> None:
    axis = net.axis
    net.step(
        f"{net.pick('h', f'{net.layer(net.int(2, 6))}(h)')} * {net.pick(f'h.shape[{axis}] ** -0.5', 'h[0].numel() ** -0.5')}"
    )


@piece("map", weight=1.5)
def branch_on_size(net: Source) -> None:
    here, there = (net.layer(net.channels, net.pick(1, 3)) for _ in range(2))
    there = net.pick(there, "F.relu", there)
    limit = net.shape[-1] + net.pick(0, 1, -1)
    net.step(f"{here}(h) if h.shape[-1] > {limit} else {there}(h)")


# --- sizes of maps ------------------------------------------------------------------------------------------------------------


@piece("map")
def pooling(net: Source) -> None:
    d = net.dims
    net.step(net.pick(f"F.max_pool{d}d(h, 2)", f"F.avg_pool{d}d(h, 3, 1, 1)", f"F.adaptive_avg_pool{d}d(h, 2)"))


@piece("map", weight=0.7)
def upsampling(net: Source) -> None:
    net.step("F.interpolate(h, scale_factor=2)")


@piece("map")
def to_tokens(net: Source) -> None:
    net.step("h.flatten(2).transpose(1, 2)", "tokens")


@piece("map", "tokens", weight=0.5)
def to_vector(net: Source) -> None:
    if net.kind == "tokens":
        net.step(net.pick("h.mean(1)", "h[:, 0]", "h.flatten(1)"), "vector")
    else:
        net.step(
            net.pick(f"h.mean({tuple(range(2, len(net.shape)))})", "h.flatten(1)", f"h.amax({(*range(2, len(net.shape)),)})"),
            "vector",
        )


@piece(*ANY, weight=0.7)
def keep(net: Source) -> None:
    net.let("kept = h")
