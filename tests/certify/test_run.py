"""Running a model changes nothing of it, of the process or of another thread, and costs its forward passes."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pairs import Apply, family
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmorph as fm
from fastmorph.certify.recorded import certify, record
from fastmorph.certify.run import run
from fastmorph.certify.verify import verify
from fastmorph.inputs import Inputs


class Writing(nn.Linear):
    """A forward that writes into its parameters and buffers, and keeps things on itself."""

    def __init__(self, how: str) -> None:
        super().__init__(3, 3)
        self.how, self.calls, self.kept = how, 0, [0]
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(1)
        self.last = x
        self.count.add_(1)
        match self.how:
            case "in place":
                self.weight.mul_(2)
            case "through data":
                self.weight.data.mul_(2)
            case "item":
                self.weight[0] = 2
            case "operator":
                self.bias += 1
            case "out":
                torch.add(self.bias, 1, out=self.bias)
            case "view":
                self.weight.view(-1)[0:2].zero_()
            case "function in place":
                F.relu(self.weight, True)
            case "numpy":
                self.bias.detach().numpy()[:] = 3
            case "embedding":
                F.embedding(torch.tensor([0, 1]), self.weight, None, 0.1)
            case "new data":
                self.weight.data = self.weight.new_ones(3, 3)
            case "swallowing":
                try:
                    self.weight.mul_(2)
                except Exception:
                    return x
            case "raising":
                self.weight.mul_(2)
                raise RuntimeError("a wall")
        return super().forward(x) + self.count


WAYS = ["in place", "through data", "item", "operator", "out", "view", "function in place", "numpy", "embedding", "new data"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [*WAYS, "swallowing"])
def test_a_forward_that_writes_changes_no_model_and_is_compared_by_what_it_does(how: str, dtype: torch.dtype) -> None:
    model, x = Writing(how).to(dtype), torch.randn(2, 3, dtype=dtype)
    child, other = deepcopy(model), deepcopy(model)
    with torch.no_grad():
        other.bias[2] += 1
    before, variables = deepcopy(model.state_dict()), set(vars(model))
    assert verify(model, child, x, tolerance=0)
    recorded = record(model, x)
    with torch.no_grad():
        expected = deepcopy(model)(x)
    assert torch.equal(recorded.outputs[()], expected)
    if how not in ("numpy",):  # it writes over what differs
        assert not verify(model, other, x)
    for one in (model, child):
        assert all(torch.equal(tensor, before[key]) for key, tensor in one.state_dict().items())
        assert (one.calls, one.kept, set(vars(one))) == (0, [0], variables)


def test_nothing_is_changed_where_forward_raises() -> None:
    model = Writing("raising")
    before = deepcopy(model.state_dict())
    with pytest.raises(fm.MorphError, match="The parent could not be run in eval mode: RuntimeError: a wall"):
        verify(model, model, torch.randn(2, 3))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert (model.calls, model.training) == (0, True)


class Allocations(TorchDispatchMode):
    """The calls of large layers, and the largest float64 tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.layers += func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default)
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_a_certificate_costs_its_forward_passes_and_casts_one_weight_at_a_time() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 1000)
    )
    child, x = deepcopy(model), torch.randn(1, 3, 8, 8)
    with Allocations() as once, torch.no_grad():
        model(x)
    assert once.layers == 3
    with Allocations() as seen:
        assert verify(model, child, x)
    assert seen.layers == 2 * 3 + 2 * 2  # in float64 the large linear layer runs as products of some of its rows at a time
    assert seen.largest <= 8 * 2**18 < 8 * model[4].weight.numel()
    with Allocations() as seen:
        assert verify(model, child, x, exact=False)
    assert seen.layers == 2 * 3


def test_memory_held_on_top_of_the_models_is_one_weight() -> None:
    """Every float64 tensor that lives at once, weights of 64 * 64 * 9 entries each: one cast, and some activations."""
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)))
    most = 0

    class Living(TorchDispatchMode):
        alive: dict[int, int] = {}  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64 and out.numel() == model[0].weight.numel():
                self.alive[id(out)] = 1
                weakref.finalize(out, self.alive.pop, id(out), None)
                most = max(most, len(self.alive))
            return out

    with Living():
        assert verify(model, deepcopy(model), torch.randn(1, 64, 2, 2))
    assert most == 1


def test_what_follows_in_float64_is_float64() -> None:
    """Weights read by forward, recurrent layers, embeddings, tied weights, constants and mixed products."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rnn, self.head = nn.Embedding(7, 5), nn.LSTM(5, 5, 2), nn.Linear(5, 7)
            self.head.weight = self.table.weight
            self.register_buffer("scale", torch.rand(5))
            self.dtypes: list[torch.dtype] = seen

        def __deepcopy__(self, memo: Any) -> Any:
            twin = Reads.__new__(Reads)
            memo[id(self)] = twin
            vars(twin).update({k: v if k == "dtypes" else deepcopy(v, memo) for k, v in vars(self).items()})
            return twin

        def forward(self, ids: Tensor) -> Tensor:
            y = self.table(ids).to(self.head.weight.dtype) * self.scale
            y = self.rnn(y)[0] + self.head.weight.norm() + torch.zeros(5) + torch.arange(5) / 5
            y = F.linear(y, self.head.weight.T.contiguous().T, self.head.bias)
            y = y @ torch.eye(7, dtype=torch.float32)
            self.dtypes.append(y.dtype)
            return y

    seen: list[torch.dtype] = []
    model = Reads()
    ids = torch.randint(7, (4, 2))
    assert verify(model, deepcopy(model), ids, tolerance=0)
    assert seen == [torch.float32] * 2 + [torch.float64] * 2
    with torch.no_grad():
        expected = deepcopy(model).double()
        expected.rnn.double()
        y = expected.table(ids) * expected.scale
        y = expected.rnn(y)[0] + expected.head.weight.norm() + (torch.arange(5) / 5).double()
        y = expected.head(y)
    found = run(model, "parent", "eval", Inputs((ids,), {}), torch.float64).outputs[()]
    torch.testing.assert_close(found, y, rtol=1e-14, atol=1e-14)


# --- threads ------------------------------------------------------------------------------------------------------------


def test_two_threads_verify_at_once_and_leave_the_process_as_it_was() -> None:
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    parent, child, x = family(dtype=torch.float32)
    _, wrong, _ = family(error=1e-2, dtype=torch.float32)

    def settings() -> list[Any]:
        flags = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
        flags += torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.conv.fp32_precision
        numpy_state = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]  # noqa: NPY002
        tensors = [tensor.tolist() for tensor in shared.state_dict().values()]
        return [flags, torch.get_rng_state().tolist(), random.getstate(), numpy_state, tensors, shared.training]

    before, found, done = settings(), [], threading.Event()
    dtypes = set()

    def work(number: int) -> None:
        for _ in range(20):
            dropped = verify(shared, deepcopy(shared), torch.ones(4, 6), modes=("train", "eval"), tolerance=0)
            found.append((number, bool(dropped), bool(verify(parent, child, x)), bool(verify(parent, wrong, x))))

    def watch() -> None:
        while not done.is_set():
            dtypes.add((torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled(), torch.zeros(1).dtype))

    watching = threading.Thread(target=watch)
    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in (watching, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watching.join()
    assert sorted(found) == sorted([(number, True, True, False) for number in (0, 1)] * 20)
    assert settings() == before
    assert dtypes == {(torch.float32, True, torch.float32)}


# --- the caller's contexts ------------------------------------------------------------------------------------------------


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta"), default_device],
)
def test_the_callers_context_changes_no_certificate(context: Any) -> None:
    parent, child, x = family(dtype=torch.float32)
    _, wrong, _ = family(error=1e-2, dtype=torch.float32)
    models = [nn.Sequential(model, Apply(lambda y: y + torch.ones(4) * 2)) for model in (parent, child, wrong)]
    outside = [verify(models[0], model, x) for model in models[1:]]
    with context():
        inside = [verify(models[0], model, x) for model in models[1:]]
        assert bool(certify(record(models[0], x), models[1], x))
    assert [c.rows for c in inside] == [c.rows for c in outside]
    assert [bool(c) for c in inside] == [True, False]


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        x = torch.randn(2, 3, 5, 5)
        child = deepcopy(model)
    assert verify(model, child, x, modes=("eval", "train"), tolerance=0)


def test_channels_last_models() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    assert verify(model, deepcopy(model).to(memory_format=torch.contiguous_format), torch.randn(2, 3, 7, 7))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_parent_is_compared_on_copies() -> None:
    parent, child, x = family(dtype=torch.float32)
    _, wrong, _ = family(error=1e-2, dtype=torch.float32)
    scripted = torch.jit.trace(parent, x)
    certificate = verify(scripted, child, x)
    assert certificate, certificate
    assert [row.precision for row in certificate.rows] == ["float32", "float64"]
    assert not verify(scripted, wrong, x)
    assert all(p.dtype == torch.float32 for p in scripted.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_stand_for_the_network_inside(tmp_path: Any) -> None:
    parent, child, x = family(dtype=torch.float32)
    assert verify(nn.DataParallel(parent), child, x).rows == verify(parent, child, x).rows
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(parent)
        assert verify(wrapped, child, x).rows == verify(parent, child, x).rows
        assert certify(record(wrapped, x), child, x)
    finally:
        dist.destroy_process_group()
    assert verify(torch.compile(parent), child, x).rows == verify(parent, child, x).rows


def test_the_meta_device_holds_nothing_to_compare() -> None:
    model = nn.Linear(3, 2, device="meta")
    for models, x in (
        ((model, model), torch.ones(2, 3, device="meta")),
        ((nn.ReLU(), nn.ReLU()), torch.ones(2, device="meta")),
    ):
        with pytest.raises(fm.MorphError, match="on the meta device, where there are no values to compare"):
            verify(*models, x)
        with pytest.raises(fm.MorphError, match="on the meta device, where there are no values to compare"):
            record(models[0], x)


# --- morph's word between -------------------------------------------------------------------------------------------------


def test_morph_verifies_as_much_as_is_asked() -> None:
    parent, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(3, 6)
    plan = fm.Plan([fm.Deepen("0", hidden_channels=16)])
    precisions = {True: ["float32", "float64"], "outputs": ["float32"]}
    for word, expected in precisions.items():
        certificate = fm.morph(parent, plan, example_inputs=x, verify=word).certificate
        assert certificate is not None
        assert certificate
        assert [row.precision for row in certificate.rows] == expected
    assert fm.morph(parent, plan, example_inputs=x, verify=False).certificate is None
    with pytest.raises(fm.MorphError, match="verify takes True, False or \"outputs\", not 'all'"):
        fm.morph(parent, plan, example_inputs=x, verify="all")
