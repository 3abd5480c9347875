"""PyTorch's own layers, one behind the other: what they do with more channels is known, and takes no run of the model.

A link is a convolution or linear layer, whatever takes its channels one by one behind it, and the layer of the same class that
reads them. Where such a model is `nn.Sequential`s of PyTorch's modules all through, no code of anybody else reads a size, and
none of these modules does: a model in which whole links grow, all of a link's tensors in one layout, does what it did.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as globally

from fastmorph.graph.growth import Growth
from fastmorph.graph.record import Axis, Record
from fastmorph.graph.skeleton import Skeleton

Link = tuple[Axis, ...]

_EACH = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh),
    *(nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Identity, nn.Dropout),
)
_LAYERS: dict[type[nn.Module], frozenset[type[nn.Module]]] = {  # and what may stand behind them in a link
    nn.Linear: frozenset((*_EACH, nn.BatchNorm1d)),
    nn.Conv1d: frozenset((*_EACH, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)),
    nn.Conv2d: frozenset((*_EACH, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)),
    nn.Conv3d: frozenset((*_EACH, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)),
}


def links_of(skeleton: Skeleton, record: Record) -> list[Link]:
    """The links of a model, each as the axes that grow together; none where code runs that is not known.

    Args:
        skeleton: the model.
        record: what a run of it found.
    """
    modules = list(skeleton.model.named_modules(remove_duplicate=False))
    shared = len({id(module) for _, module in modules}) < len(modules) or any(len(n) > 1 for n in skeleton.names.values())
    hooked = globally._global_forward_hooks or globally._global_forward_pre_hooks
    if shared or hooked or not all(_is_stock(module) for _, module in modules):
        return []
    links: list[Link] = []
    link: list[Axis] = []
    begun: type[nn.Module] = nn.Identity  # the class of the layer that a link began with
    for name, module in modules:
        kind = type(module)
        tensors = dict(module.named_parameters(name, recurse=False)) | dict(module.named_buffers(name, recurse=False))
        along = [record.parameter(key)[0] for key, tensor in tensors.items() if tensor.ndim]
        if kind is nn.Sequential:
            continue
        if kind in _LAYERS and f"{name}.weight" in tensors and getattr(module, "groups", 1) == 1:
            if kind is begun:
                links.append((*link, record.parameter(f"{name}.weight")[1]))
            begun, link = kind, along
        elif kind in _LAYERS.get(begun, ()):
            link += along
        else:
            begun = nn.Identity
    return links


def is_of_links(growth: Growth, links: list[Link]) -> bool:
    """Whether whole links grow, all of each in one layout, and nothing else."""
    if growth.way or growth.even or growth.numbers or growth.repeats:
        return False
    left = dict(growth.layouts)
    for link in links:
        found = [left.pop(axis) for axis in link if axis in left]
        if found and (len(found) < len(link) or not all(layout.same(found[0]) for layout in found)):
            return False
    return not left


def _is_stock(module: nn.Module) -> bool:
    """Whether a module does what PyTorch's class does, and knows no other module."""
    kind = type(module)
    known = kind is nn.Sequential or (_is_torchs(kind) and not module._modules)
    own = _is_torchs(kind.forward) and "forward" not in vars(module)
    plain = not any(isinstance(value, Tensor) for value in vars(module).values())  # tensors are parameters or buffers
    return known and own and plain and not module._forward_hooks and not module._forward_pre_hooks


def _is_torchs(thing: object) -> bool:
    """Whether a class or a function stands in PyTorch's layers; what is made by `exec` may stand in no module at all."""
    return str(thing.__module__).startswith("torch.nn.modules.")
