"""Layers that a morph inserts, each the identity at birth: activations that fade in, and batch norm."""

from fastmorph.nn.activation import PActivation, PReLU
from fastmorph.nn.branches import Branches
from fastmorph.nn.fading import ActivationSchedule, activation_penalty, fold_activations
from fastmorph.nn.mixture import Mixture
from fastmorph.nn.norm import BatchNormLast, BatchNormMap1d, BatchNormMap2d, BatchNormMap3d, identity_batch_norm
from fastmorph.nn.replacement import Replacement
from fastmorph.nn.same_pad import SamePad

__all__ = [
    "ActivationSchedule",
    "BatchNormLast",
    "BatchNormMap1d",
    "BatchNormMap2d",
    "BatchNormMap3d",
    "Branches",
    "Mixture",
    "PActivation",
    "PReLU",
    "Replacement",
    "SamePad",
    "activation_penalty",
    "fold_activations",
    "identity_batch_norm",
]
