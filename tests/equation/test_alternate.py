"""The operator that alternates a fixed number of times: the same answers as the solver, in a graph, without waiting."""

from __future__ import annotations

import pytest
import torch
from strategies import Case, oracle_residual
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmorph as fm
from fastmorph.equation import alternate, backends
from fastmorph.equation.frame import make_frame
from fastmorph.equation.randomness import Noise


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_one_half_step_is_exact_where_claim_1_holds(dims, dtype, bound):
    weight = noise(2, 3, 2, *(3,) * dims, dtype=dtype)
    first = noise(2, 2 * 5**dims if dims else 4, 2, *(3,) * dims, dtype=dtype)
    one, two, residual = fm.alternate(weight, first, (3,) * dims, backend="torch")
    frame = make_frame((3,) * dims, ((3,) * dims, (3,) * dims))
    assert torch.equal(one, first)
    assert oracle_residual(Case(weight, frame, dims), one, two) <= bound
    assert float(residual.max()) <= bound


def test_it_follows_the_solver():
    """Below Claim 1, from the same noise: Algorithm 1's own residuals, half-step by half-step."""
    weight = noise(1, 4, 4, 5, 5)
    seed = 7
    found = fm.decompose(
        weight, 7, solver=fm.General(3, acceleration=None), generator=torch.Generator().manual_seed(seed), allow_inexact=True
    )
    drawn = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
    first = Noise([drawn], [1], weight.device, torch.float64)(7, 4, 3, 3) / 36**0.5
    for steps in (1, 2, 5, 6):
        residual = fm.alternate(weight, first, (3, 3), steps, backend="torch")[2]
        torch.testing.assert_close(residual, found.trace[steps - 1], rtol=1e-9, atol=0)


def test_an_exact_item_rests_and_a_singular_one_is_told():
    weight = noise(3, 2, 2, 3, 3)
    first = noise(3, 9, 2, 3, 3)
    first[1] = 0
    one, two, residual = fm.alternate(weight, first, (3, 3), 4, backend="torch")
    assert torch.equal(one[1], first[1])
    assert float(residual[1]) == 1.0
    assert bool((residual[[0, 2]] <= 1e-13).all())
    assert torch.equal(two[[0, 2]], fm.alternate(weight[[0, 2]], first[[0, 2]], (3, 3), 1, backend="torch")[1])


def test_it_never_waits_for_the_device():
    """Tensors without data cannot be looked at: a solve that asked for a value would raise here."""
    with FakeTensorMode():
        weight, first = torch.empty(2, 6, 4, 3, 3), torch.empty(2, 15, 4, 3, 3)
        one, two, residual = alternate.fixed_half_steps(weight, first, (3, 3), 4, "torch", "ieee")
    assert (one.shape, two.shape, residual.shape) == ((2, 15, 4, 3, 3), (2, 6, 15, 3, 3), (2,))


class _Captured(TorchDispatchMode):
    """Refuse what a CUDA graph cannot hold: values that are read or decide a size, checks for errors, copies to and fro."""

    refused = frozenset(
        {"_local_scalar_dense", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "nonzero", "masked_select", "equal"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        assert name not in self.refused, name
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert name not in ("_to_copy", "copy_") or len({x.device for x in tensors}) == 1
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(masks))
        self.seen.add(name)
        return out


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "hidden", "size", "batched"),
    [
        ((1, 4, 3), 6, (), False),
        ((2, 6, 4, 3), 9, (3,), False),
        ((2, 40, 40, 3, 3), 70, (3, 3), True),
        ((1, 9, 9, 2, 2, 2), 9, (2, 2, 2), False),
    ],
)
def test_a_graph_can_hold_it(monkeypatch, backend, dtype, shape, hidden, size, batched):
    """Without values, on a device that is not at hand: a GPU's path, F2 and F1 in turn, by rows, by columns and by panels."""
    monkeypatch.setattr(backends, "why_unavailable", lambda tensor: None)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    first = torch.empty(shape[0], hidden, shape[2], *size, dtype=dtype, device="meta")
    with _Captured() as captured:
        one, two, residual = alternate.fixed_half_steps(weight, first, size, 3, backend, "ieee")
    assert (one.shape, two.shape, residual.shape) == (first.shape, (shape[0], shape[1], hidden, *size), shape[:1])
    assert {"linalg_cholesky_ex", "linalg_solve_triangular"} <= captured.seen
    assert ("eye" in captured.seen) == batched  # the corners' inverses


def test_it_is_an_operator_that_compiles():
    weight, first = noise(2, 3, 2, 3, 3), noise(2, 2, 9, 3, 3).transpose(1, 2)
    torch.library.opcheck(alternate._alternate, (weight, first, [3, 3], 2, "torch", "float64"))
    compiled = torch.compile(lambda w, f: fm.alternate(w, f, (3, 3), 2, backend="torch"), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(weight, first), fm.alternate(weight, first, (3, 3), 2, backend="torch"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_by_kernels_too(kernel_device):
    weight, first = noise(1, 2, 2, 3).to(kernel_device), noise(1, 4, 2, 3).to(kernel_device)
    by_kernels = fm.alternate(weight, first, (3,), 2, backend="triton")
    plain = fm.alternate(weight, first, (3,), 2, backend="torch")
    for ours, theirs in zip(by_kernels, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("weight", "first", "options", "words"),
    [
        (noise(1, 2, 2, 3).half(), noise(1, 4, 2, 3).half(), {}, "float32 or float64"),
        (noise(1, 2, 2, 3), noise(1, 4, 3, 3), {}, "shapes"),
        (noise(1, 2, 2, 3), noise(1, 4, 2, 3), {"half_steps": 0}, "half_steps"),
        (noise(1, 2, 2, 3), noise(1, 4, 2, 3), {"precision": "tf32"}, "float64 weights"),
        (noise(1, 2, 2, 3).float(), noise(1, 4, 2, 3).float(), {"precision": "tf32", "backend": "torch"}, "triton"),
    ],
)
def test_refusals(weight, first, options, words):
    with pytest.raises(fm.MorphError, match=words):
        fm.alternate(weight, first, (3,), **options)
