"""Networks: a start, some pieces, a head, and an output of some shape; all of it source text that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz import hostile as _hostile  # noqa: F401 - registers its pieces
from tests.fuzz import norms as _norms  # noqa: F401 - registers its pieces
from tests.fuzz.pieces import PIECES, Piece
from tests.fuzz.source import NAMES, Batch, Input, Source, race

# --- starts -------------------------------------------------------------------------------------------------------------------


def image(net: Source) -> None:
    net.input("x", "batch", net.int(2, 4), *["size"] * net.pick(1, 2, 2, 2, 2, 3))
    net.step("x", "map")
    if net.chance(0.7):
        net.step(f"{net.layer(net.int(2, 6))}(h)")


def vector(net: Source) -> None:
    net.input("x", "batch", net.int(3, 8))
    net.step("x", "vector")
    net.step(f"{net.layer(net.int(3, 8))}(h)")


def sequence(net: Source) -> None:
    net.input("x", "batch", "size", net.int(2, 6))
    net.step("x", "tokens")
    if net.chance(0.7):
        net.step(f"{net.layer(net.int(2, 6))}(h)")


def embedded(net: Source) -> None:
    net.input("x", "batch", "size", high=9)
    net.step(f"{net.make('embedding', f'nn.Embedding(9, {net.int(2, 6)})')}(x)", "tokens")


def bag(net: Source) -> None:
    net.input("x", "batch", "size", high=9)
    mode = net.pick("sum", "mean")
    net.step(f"{net.make('bag', f'nn.EmbeddingBag(9, {net.int(2, 6)}, mode={mode!r})')}(x)", "vector")


def two_vectors(net: Source) -> None:
    net.input("x", "batch", net.int(2, 5))
    net.input("y", "batch", net.int(2, 5))
    sizes = ", ".join(str(net.values[name].shape[1]) for name in "xy")
    net.step(f"{net.make('bilinear', f'nn.Bilinear({sizes}, {net.int(2, 6)})')}(x, y)", "vector")


def two_images(net: Source) -> None:
    image(net)
    net.input("y", "batch", net.int(1, 3), *["size"] * net.dims)
    first, second = net.layer(c := net.int(2, 6)), net.layer(c, inputs=net.values["y"].shape[1])
    alone = net.values["y"].shape[1] == 1 and net.chance(0.7)  # one channel meets them all
    net.step(f"{first}(h) {net.pick('+', '*')} {'y' if alone else f'{second}(y)'}")


def optional_image(net: Source) -> None:
    image(net)
    net.input("y", "batch", net.int(1, 3), *["size"] * net.dims, optional=True)
    side = net.layer(net.channels, inputs=net.values["y"].shape[1])
    net.step(f"h if y is None else {net.pick(f'h + {side}(y)', f'{side}(y)', f'h * torch.sigmoid({side}(y))')}")


def late_option(net: Source) -> None:
    image(net)
    layer = net.layer(c := net.int(2, 6))
    net.input("y", "batch", c, *["size"] * net.dims, optional=True)
    net.step(f"{layer}(h) if y is None else {layer}(h) {net.pick('+', '*')} y")


def single_image(net: Source) -> None:
    net.input("x", net.int(2, 4), *["size"] * net.pick(1, 2))
    d, c = net.values["x"].ndim - 1, net.values["x"].shape[0]
    net.let(f"h = {net.make('conv', f'nn.Conv{d}d({c}, {net.int(2, 6)}, 3, padding=1)')}(x)")
    net.step(net.pick("h[None]", "(h / (1 + h.abs().mean(0, keepdim=True)))[None]", "(h - h.mean(0))[None]"), "map")


def either_image(net: Source) -> None:
    net.input("x", net.int(2, 4), "size", "size")
    net.step("x if x.ndim == 4 else x[None]", "map")


STARTS: dict[str, tuple[Piece, float]] = {
    **{"image": (image, 9), "vector": (vector, 2), "sequence": (sequence, 2), "embedded": (embedded, 2), "bag": (bag, 0.7)},
    **{"two_vectors": (two_vectors, 0.7), "two_images": (two_images, 1), "optional_image": (optional_image, 1)},
    **{"late_option": (late_option, 1), "single_image": (single_image, 1), "either_image": (either_image, 0.7)},
}

# --- heads and outputs --------------------------------------------------------------------------------------------------------


HEAD = 8  # its slot: behind those of all pieces


def head(net: Source) -> None:
    if net.kind == "map" and net.chance(0.6):
        to_vector = net.pick(
            f"h.mean({tuple(range(2, len(net.shape)))})", "h.flatten(1)", f"F.adaptive_avg_pool{net.dims}d(h, 1).flatten(1)"
        )
        net.step(to_vector, "vector")
    elif net.kind == "tokens" and net.chance(0.4):
        net.step("h.mean(1)", "vector")
    table = next((line.split(" = ")[0] for line in net.init if "nn.Embedding(" in line), None)
    if net.kind == "tokens" and table is not None and net.chance(0.5):
        width = net.values["self"].get_submodule(table.removeprefix("self.")).embedding_dim
        if net.channels == width and net.chance(0.5):
            net.write(f"{(layer := net.layer(9, bias=False))}.weight = {table}.weight")
            net.step(f"{layer}(h)")
            return
        if net.channels == width:
            net.step(f"F.linear(h, {table}.weight)")
            return
    if net.chance(0.85):
        net.step(f"{net.layer(net.int(2, 4), 1)}(h)")


OUTPUTS = (
    *["h"] * 14,
    *("h, KEPT", "[h, KEPT]", "{'logits': h, 'hidden': KEPT}", "Named(h, KEPT)", "Record(h, KEPT)", "Record(KEPT, [h])"),
    *("Plain(logits=h)", "(KEPT, Plain(logits=h))", "UserDict(logits=h)", "iter([h])", "(t for t in (h, KEPT))", "Slots(h)"),
    *("{'a': (h, {'b': Plain(deep=[h])})}", "map(torch.tanh, [h])", "h, PENALTY"),
    *("h, sum(p.square().sum() for p in self.parameters())", "h, 'done', 3, None"),
)


def output(net: Source) -> None:
    kept = "kept" if "kept" in net.values else "h.mean()"
    layers = [line.split(" = ")[0] for line in net.init if " = nn.Conv" in line or " = nn.Linear(" in line]
    penalty = f"{net.pick(*layers)}.weight.square().sum()" if layers else "0.0"
    form = net.pick(*OUTPUTS).replace("KEPT", kept).replace("PENALTY", penalty)
    net.let(f"out = {form}")
    net.body[-1] = net.body[-1].replace("out = ", "return ")


# --- the network --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network's source, and how to run it."""

    seed: int
    text: str
    pieces: tuple[str, ...]
    inputs: dict[str, Input]
    form: str
    mode: str
    dtype: torch.dtype
    grain: torch.dtype

    def build(self) -> nn.Module:
        """The module, with statistics that look trained."""
        names = dict(NAMES)
        exec(self.text, names)
        model: nn.Module = names["Net"]()
        parts = {p for p in model.parameters() if p.dtype == torch.bfloat16}
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    if name.endswith(("weight_u", "weight_v", "0._u", "0._v")):  # spectral norms want unit vectors
                        noise = noise.abs() / noise.norm() * 2**0.5
                    positive = name.endswith(("running_var", "original0", "weight_g")) or (
                        tensor.ndim == 1 and name.endswith("weight")
                    )
                    scale = max(1, tensor[0].numel() if tensor.ndim > 1 else 2) ** 0.5 * 2.0 ** -getattr(tensor, "power", 0)
                    tensor.data = (0.5 + noise.abs() if positive else noise / scale).to(
                        torch.bfloat16 if tensor in parts else self.dtype
                    )
        model.train(self.mode != "eval")
        if self.mode == "mixed":
            random.Random(self.seed).choice(list(model.modules())).eval()
        return model

    def call(self, seed: int, batch: int, size: int, options: bool) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Arguments of one call, of a batch and a map size, with the optional inputs or without."""
        generator = torch.Generator().manual_seed(seed)
        made = {
            name: i.make(generator, batch, size, self.dtype) for name, i in self.inputs.items() if options or not i.optional
        }
        if self.form == "keywords":
            return (), made
        bags = {"dict": made, "nested": {"data": [made]}, "named": Batch(**made) if self.form == "named" else None}
        return ((bags[self.form],) if self.form in bags else tuple(made.values())), {}


def network(seed: int, pieces: Collection[int] | None = None) -> Network:
    """The network of a seed; `pieces` are the numbers of those that stay, all if None."""
    draw = random.Random(f"{seed}.network")
    net = Source(seed)
    net.form = draw.choice(["positional"] * 36 + ["keywords", "dict", "named", "nested"])
    net.mode = draw.choice(["eval"] * 6 + ["train"] * 2 + ["mixed"])
    net.dtype = draw.choice([torch.float64] * 15 + [torch.float32] * 4 + [torch.bfloat16])
    start = race(f"{seed}.start", {name: weight for name, (_, weight) in STARTS.items()})
    if not net.attempt(0, start, STARTS[start][0]):
        net.attempt(0, "image", image)
    for slot in range(1, 1 + draw.randint(1, 6)):
        fitting = {name: weight for name, (_, kinds, weight) in PIECES.items() if net.kind in kinds}
        chosen = race(f"{seed}.{slot}", fitting)
        if pieces is None or slot in pieces:
            net.attempt(slot, chosen, PIECES[chosen][0])
    net.attempt(HEAD, "head", head)
    net.attempt(HEAD + 1, "output", output) or net.let("return h")
    return Network(seed, net.text(), tuple(net.pieces), dict(net.inputs), net.form, net.mode, net.dtype, net.grain)
