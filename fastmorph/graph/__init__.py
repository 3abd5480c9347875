"""Which layers of a model share channels, found by running it once without computing anything.

The words of this room, each with one meaning:

- atom: one index of one dimension of a parameter or buffer, an integer; what is copied when a layer grows.
- axis: such a dimension, with its atoms in order.
- label: an int64 tensor that says which atom each position of a tensor belongs to, of size 1 along dimensions where that does
  not change; FIXED where a position belongs to no channel, FREE where it holds one constant for all.
- slot: one label of a tensor. A convolution's output has one, along its channels; a weight has one a dimension.
- flow: all that is known about one tensor of the run: its slots, and whether it holds data beside them.
- tie (edge): two atoms that met at one position of an operator, so that neither can be copied without the other.
- line: the atoms along one dimension of a label, or those that are normalised or mixed with each other.
- class: atoms that ties join, directly or through others; called by the smallest of them.
- kind: classes of one kind take the same ways through the model and differ only in their indices; they are kin.
- mark: what an operator does with atoms beside tying them, e.g. reads them with a weight's columns (`record.Kind`).
- bent: a mark, of a weight's entries that go into a product more than once, so that opposite columns would not cancel.
- block: atoms that cannot be copied, with the cause.
- poison: a tensor that blocks atoms if anything reads it, e.g. the place of a maximum among them.
- whole: indices of a parameter that are followed as one channel, called by the first: the rows of a head of attention.
- split: channels that a module's forward arranges in several dimensions; scores: what it takes a softmax of.
- journal: the operators that computed, in order, with their numbers; a grown model must run the same.
- norm: a layer that normalises channels, in a record with the atoms of these (`Record.norms`).
- structure: the model without weights, and the record of one run of it.
- growth: which classes get how many copies; its layouts say where in each axis these stand.
- dataflow: one run as a graph of operators and what made their arguments, read backwards from any tensor.
- writer: a weight that writes what a residual block adds to its stream.
- stream: channels that norms read, which grow to any width (`fastmorph.graph.streams`).
- tape: what one run did, to be read beside that of the grown model.
- stage: growths of several layers that meet nowhere, checked by one run of the grown model.
"""

from fastmorph.graph.coupled import Coupled
from fastmorph.graph.flow import Flow
from fastmorph.graph.rules import rule
from fastmorph.graph.structure import Structure, coupled, follow
from fastmorph.graph.tracer import Call, Tracer

__all__ = ["Call", "Coupled", "Flow", "Structure", "Tracer", "coupled", "follow", "rule"]
