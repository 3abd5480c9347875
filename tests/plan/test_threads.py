"""Morphs in several threads at once leave the process as it was, and give the children that they would give alone."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import fastmorph as fm

X = torch.randn(2, 3, 9, 8)
PLANS = [
    [fm.Widen("0", 12), fm.Deepen("3", 16, (3, 3), "relu")],
    [fm.Deepen("0"), fm.Widen("0.first", 24, "zero"), fm.GrowKernel("3", 5)],
    [fm.InsertSubnet("3", fm.Stacked([fm.Skip(), fm.Sequential([(8, 3, "gelu"), (None, 2)])])), fm.GrowKernel("0", 5)],
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same"), nn.Flatten(2)
    ).eval()


def settings():
    flags = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads()
    flags += torch.backends.mha.get_fastpath_enabled(), torch.are_deterministic_algorithms_enabled()
    flags += torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return [flags, list(warnings.filters), torch.get_rng_state().tolist()]


def test_morphs_at_once_leave_the_process_as_it_was():
    def child(number):
        plan, inputs = PLANS[number % len(PLANS)], None if number % 2 else X
        return [p.detach() for p in fm.morph(parent, plan, example_inputs=inputs, generator=number).model.parameters()]

    parent = network()
    alone = [child(number) for number in range(6)]
    before, seen, done = settings(), set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add((torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled(), len(warnings.filters)))

    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(child, range(6)))
    done.set()
    watching.join()
    assert settings() == before
    assert len(seen) == 1
    for one, two in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
