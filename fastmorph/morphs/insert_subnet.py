"""Subnets: a layer becomes layers in a row, branches that sum, or itself with a residual block behind it.

Branches share the weight out among them, each share with noise of its own; the first that reaches over the whole kernel takes
what is left, and the bias. As in `deepen.py`, all padding is in the first layer of each branch, so that nothing is lost
at the border of the maps between.

Source: Wei et al., "Network Morphism" (2016), Section 3.4, and "Modularized Transaction of Neural Networks" (2017).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fastmorph.equation.bounds import tolerance
from fastmorph.equation.frame import Size, size_per_dimension
from fastmorph.equation.peel import find_whole, share_out
from fastmorph.errors import MorphError
from fastmorph.morphs.rows import CONVS, LayerRow, build_row, make_norm, make_row, solve_row
from fastmorph.morphs.subnet import Residual, Sequential, Skip, Stacked, Subnet
from fastmorph.nn import PActivation, Replacement
from fastmorph.nn.branches import Branches
from fastmorph.plan.layers import Layer
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction


@dataclass(frozen=True)
class InsertSubnet:
    """Replace a layer by a subnet, as data: its name and an `fm.Sequential`, `fm.Stacked` or `fm.Residual`."""

    local: ClassVar[bool] = True
    layer: str
    subnet: Subnet

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Build the subnet and queue its equations."""
        subnet = self.subnet
        layer = transaction.find_layer(self.layer, stays=isinstance(subnet, Residual))
        if isinstance(subnet, Residual):
            _add_residual(transaction, layer, subnet)
        elif isinstance(subnet, Sequential | Stacked):
            _replace(transaction, layer, subnet.branches if isinstance(subnet, Stacked) else (subnet,))
        else:
            raise MorphError(f"layer {layer.name!r}: {subnet!r} is not an fm.Sequential, fm.Stacked or fm.Residual.")


def _replace(transaction: Transaction, layer: Layer, branches: Sequence[Sequential | Skip]) -> None:
    weight, bias = layer.module.weight, layer.module.bias
    rows = {index: make_row(layer, branch) for index, branch in enumerate(branches) if isinstance(branch, Sequential)}
    try:
        whole = find_whole({index: row.peeling for index, row in rows.items()}, layer.kernel)
    except MorphError as error:
        raise error.within(f"layer {layer.name!r}") from None
    skip = _identity(layer) if len(rows) < len(branches) else None
    built = {i: build_row(transaction, layer, row, bias if i == whole else None) for i, row in rows.items()}
    new = Branches(built.get(i, nn.Identity()) for i in range(len(branches))) if len(branches) > 1 else built[whole]
    if transaction.with_weights:
        for i, share in _shares(transaction, layer, rows, whole, skip).items():
            modules = [part for name, part in built[i].named_children() if name.startswith("layer")]
            solve_row(transaction, layer, rows[i], modules, share, f"branch {i}" if len(branches) > 1 else "")
    transaction.replace_module(layer.module, new, near=weight)


def _identity(layer: Layer) -> tuple[int, ...]:
    """The tap at which the layer's weight would be the identity. Raises MorphError where none would."""
    co, ci = layer.channels
    taps = []
    if layer.dims:
        sides = zip(layer.padding(), layer.module.stride, layer.module.dilation, layer.kernel, strict=True)
        taps = [a // d if s == 1 and a + b == d * (k - 1) and a % d == 0 else -1 for (a, b), s, d, k in sides]
    if co != ci or -1 in taps:
        raise MorphError(
            f"layer {layer.name!r} cannot have an fm.Skip beside it: it must have as many outputs as inputs ({co} and {ci}), "
            "stride 1, and padding that keeps its map's size and each pixel under a tap; use a branch of a 1x1 kernel instead."
        )
    return tuple(taps)


def _shares(
    transaction: Transaction, layer: Layer, rows: dict[int, LayerRow], whole: int, skip: tuple[int, ...] | None
) -> dict[int, Tensor]:
    """Each branch's share of the weight, (groups, Co, Ci, *share), in its dtype; `whole` has what the others leave."""
    given = layer.grouped_weight()
    if len(rows) == 1 and skip is None:
        return {whole: given}
    rest = given.to(torch.float32 if given.device.type == "mps" else torch.float64, copy=True)
    if skip is not None:
        at: Any = (slice(None), slice(None), slice(None), *skip)
        identity = torch.eye(rest.shape[1], dtype=rest.dtype, device=rest.device)
        rest[at] -= identity
        lost = float((rest[at].to(given.dtype) + identity - given[at]).abs().max() / given.abs().max())
        if not (lost <= tolerance(given.dtype) or transaction.solving.get("allow_inexact")):
            raise MorphError(
                f"layer {layer.name!r} cannot have an fm.Skip beside it: its weight is so small beside the identity that "
                f"{given.dtype} would lose {lost:.1e} of it; leave the fm.Skip out."
            )

    def noise(shape: Size) -> Tensor:
        return transaction.noise("share", layer.name).tensor(shape, rest)

    return share_out(rest, {index: row.peeling for index, row in rows.items()}, whole, noise, given.dtype)


def _add_residual(transaction: Transaction, layer: Layer, subnet: Residual) -> None:
    weight, (channels, _), hidden = layer.origin, layer.channels, subnet.hidden_channels
    made: dict[str, Any] = {
        "bias": False,
        "device": "meta" if transaction.with_weights else weight.device,
        "dtype": weight.dtype,
    }
    size: tuple[int, ...] = ()
    if layer.dims:
        try:
            size = size_per_dimension(subnet.kernel_size, layer.dims)
        except MorphError as error:
            raise MorphError(f"layer {layer.name!r}: {error}") from None
        odd = all(k % 2 for k in size)
        made |= {"kernel_size": size, "padding": tuple(k // 2 for k in size) if odd else "same"}
    first, second = (skip_init(CONVS[layer.dims], *sizes, **made) for sizes in ((channels, hidden), (hidden, channels)))
    parts: OrderedDict[str, nn.Module] = OrderedDict(first=first)
    if subnet.norm is not None:
        parts["norm"] = make_norm(transaction, layer, hidden)
    parts["activation"] = PActivation(deepcopy(subnet.activation)).fn.to(weight)
    if any(parameter.numel() > 1 for parameter in parts["activation"].parameters()):
        raise MorphError(
            f"layer {layer.name!r}: {subnet.activation!r} treats channels apart, so that twins would not cancel; give a "
            "Residual an activation that is one function for all channels."
        )
    parts["second"] = second
    for part in (first, second):
        part.weight.requires_grad_(weight.requires_grad)
    if transaction.with_weights:
        one, two = (
            transaction.noise("residual", layer.name).tensor((*shape, *size), weight, (fan * prod(size)) ** -0.5)
            for shape, fan in (((hidden // 2, channels), channels), ((channels, hidden // 2), hidden))
        )
        transaction.fill(first, torch.cat([one, one]))
        transaction.fill(second, torch.cat([two, -two], dim=1))
    block = Branches([nn.Identity(), nn.Sequential(parts)])
    whole = Replacement(OrderedDict(layer=layer.module, residual=block))
    transaction.replace_module(layer.module, whole, near=layer.origin)


def insert_subnet(model: M, layer: str, subnet: Subnet, **options: Unpack[Options]) -> M:
    """Replace a layer by several in a row, or by branches that sum; or put a residual block behind it.

    Args:
        model: the parent; it is not touched.
        layer: dotted name of an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, any stride, dilation, groups and padding, or of a
            class that `register_layer` knows, whose effective weight is then split.
        subnet: an `fm.Sequential`, `fm.Stacked` or `fm.Residual`.
        **options: those of `morph`, see `Options`.

    Returns:
        The child. A Sequential is an nn.Sequential with submodules layer0, norm0, activation0, layer1, ...; a Stacked is a
        `fastmorph.nn.Branches` of such, nn.Identity for a Skip; a Residual is an nn.Sequential of the layer itself
        (layer) and the block (residual).

    Raises:
        MorphError: the layer cannot be morphed, with the cause and the remedy.
        InexactMorphError: an equation was not solved exactly.
    """
    return grow(model, [InsertSubnet(layer, subnet)], options)


register_operator(InsertSubnet, name="insert_subnet")
