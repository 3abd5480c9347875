"""The closed form in one pass: exact, dense, of equal spread, whatever the strides, tiles and batch; and its operator."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from fastmorph_kernels import direct, support
from fastmorph_kernels.direct.mixing import (
    SIDE,
    deal,
    dealing_table,
    groups_of,
    mixing_matrix,
    mixing_table,
    shares_pairs,
)

from fastmorph.equation.bounds import tolerance

pytest.importorskip("triton")

from fastmorph_kernels.direct import launch as direct_launch

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
# The requirement: rounding grows with the noise that cancels, not with sizes. `tolerance` leaves more in float64, for solvers.
BOUND = {F64: 1e-13, F32: tolerance(F32), F16: tolerance(F16), BF16: tolerance(BF16)}

# batch, Co, Ci, Ch, K, K1, K2 where the weight goes into first. Blocks hold 32 channels: 66 are three blocks, 130 are five.
SHAPES = [
    pytest.param(2, 6, 5, 6, (), (), (), id="linear-no-extras"),
    pytest.param(1, 20, 70, 29, (), (), (), id="linear-odd-extras"),
    pytest.param(1, 5, 3, 6, (3,), (3,), (2,), id="1d-one-extra"),
    pytest.param(2, 4, 3, 13, (2,), (5,), (3,), id="1d-larger-kernel"),
    pytest.param(1, 7, 4, 16, (3, 1), (3, 3), (2, 4), id="2d-uneven"),
    pytest.param(2, 3, 2, 7, (1, 2, 2), (2, 2, 3), (2, 1, 2), id="3d"),
    pytest.param(1, 1, 2, 66, (3,), (3,), (3,), id="hardly-any-weight"),
    pytest.param(1, 60, 3, 68, (3,), (3,), (3,), id="own-pairs"),
    pytest.param(1, 131, 1, 134, (2,), (3,), (2,), id="shared-pair-and-odd-extra"),
    pytest.param(1, 130, 2, 135, (), (), (), id="shared-pairs"),
    pytest.param(1, 67, 3, 68, (1,), (2,), (2,), id="blocks-without-pairs"),
]


def pad(weight: torch.Tensor, k1: Sequence[int], k2: Sequence[int], before: Sequence[int]) -> torch.Tensor:
    sizes = [a + b - 1 for a, b in zip(k1, k2, strict=True)]
    out = torch.zeros(*weight.shape[:3], *sizes, dtype=F64)
    window = [slice(a, a + n) for a, n in zip(before, weight.shape[3:], strict=True)]
    out[(..., *window)] = weight.double().cpu()
    return out


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The definition, one tap of each kernel at a time, in float64."""
    first, second = first.double().cpu(), second.double().cpu()
    k1, k2 = first.shape[3:], second.shape[3:]
    out = first.new_zeros(len(first), second.shape[1], first.shape[2], *(a + b - 1 for a, b in zip(k1, k2, strict=True)))
    for t, v in itertools.product(itertools.product(*map(range, k1)), itertools.product(*map(range, k2))):
        out[(..., *(a + b for a, b in zip(t, v, strict=True)))] += second[(..., *v)] @ first[(..., *t)]
    return out


def residual(weight, first, second, before) -> float:
    target = pad(weight, first.shape[3:], second.shape[3:], before)
    return float((compose(first, second) - target).norm() / target.norm())


def noise(*shape: int, dtype: torch.dtype = F64, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64).to(device, dtype)


def middle(k, k1, k2) -> list[int]:
    return [(a + b - 1 - n) // 2 for a, b, n in zip(k1, k2, k, strict=True)]


@pytest.fixture(params=["kernel", "fallback"])
def device(request, kernel_device, monkeypatch) -> torch.device:
    """Where the operator runs: the kernels, or what a CPU without the interpreter runs."""
    if request.param == "kernel":
        return kernel_device
    monkeypatch.setattr(support, "interpreted", lambda: False)
    return torch.device("cpu")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("into_first", [True, False], ids=["into-first", "into-second"])
@pytest.mark.parametrize(("batch", "co", "ci", "hidden", "k", "k1", "k2"), SHAPES)
def test_exact(batch, co, ci, hidden, k, k1, k2, into_first, device):
    weight = noise(batch, co, ci, *k, dtype=F64, device=device)
    if not into_first:
        weight, k1, k2 = weight.transpose(1, 2), k2, k1
    first, second = direct(weight, hidden, k1, k2, middle(k, k1, k2), 3, into_first=into_first)
    co, ci = weight.shape[1:3]
    assert first.shape == (batch, hidden, ci, *k1)
    assert second.shape == (batch, co, hidden, *k2)
    assert first.is_contiguous()
    assert second.is_contiguous()
    assert residual(weight, first, second, middle(k, k1, k2)) <= BOUND[F64]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("co", "hidden"), [(20, 40), (66, 68)])
def test_exact_to_rounding_in_every_dtype(co, hidden, dtype, device):
    weight = noise(1, co, 5, 3, dtype=dtype, device=device)
    first, second = direct(weight, hidden, (3,), (3,), (1,), 0)
    assert first.dtype == second.dtype == dtype
    assert residual(weight, first, second, (1,)) <= BOUND[dtype]


@pytest.mark.parametrize("before", range(5))
def test_wherever_the_weight_stands_in_the_frame(before, kernel_device):
    weight = noise(1, 3, 2, 2, device=kernel_device)
    first, second = direct(weight, 8, (3,), (4,), (before,), 0)
    assert residual(weight, first, second, (before,)) <= BOUND[F64]


@pytest.mark.parametrize(
    ("co", "ci", "hidden", "k", "k1", "k2", "into_first"),
    [
        (61, 17, 65, (3,), (3,), (3,), True),
        (20, 9, 40, (1, 1), (3, 3), (3, 3), True),
        (130, 20, 134, (1,), (3,), (2,), True),
        (9, 140, 144, (3,), (2,), (3,), False),
        (60, 50, 64, (), (), (), True),
    ],
)
def test_dense_and_of_equal_spread(co, ci, hidden, k, k1, k2, into_first, device):
    """With four extra channels at least 97 % of each factor's entries count, and both spreads agree within 25 %."""
    weight = 7.0 * noise(1, co, ci, *k, dtype=F32, device=device)
    first, second = direct(weight, hidden, k1, k2, middle(k, k1, k2), 0, into_first=into_first)
    for factor in (first, second):
        assert float((factor.abs() > 1e-3 * factor.std()).double().mean()) >= 0.97
    assert float(first.std() / second.std()) == pytest.approx(1.0, rel=0.25)


def test_no_channel_is_a_copy_of_another(device):
    first, second = direct(noise(1, 16, 16, 3, device=device), 32, (3,), (3,), (1,), 0)
    for rows in (first[0].flatten(1), second[0].transpose(0, 1).flatten(1)):
        unit = rows / rows.norm(dim=1, keepdim=True)
        assert float((unit @ unit.T - torch.eye(32, dtype=F64, device=rows.device)).abs().max()) < 0.99


def test_density_sets_the_outer_taps(device):
    weight = noise(1, 32, 8, 3, 3, device=device)
    for density in (0.1, 1.0):
        _, second = direct(weight, 64, (3, 3), (3, 3), (1, 1), 0, density=density)
        taps = second.square().mean(dim=(0, 1, 2)).sqrt()
        outer = ((taps.square().sum() - taps[1, 1].square()) / 8).sqrt()
        assert float(outer / taps[1, 1]) == pytest.approx(density / (1 + density**2) ** 0.5, rel=0.1)  # the centre has both


def test_spread_sets_the_noise(device):
    """P keeps norms: a weight of zeros leaves those of the noise. 2 * 12 * 60 entries: three standard deviations are 8 %."""
    weight = torch.zeros(2, 8, 20, 3, dtype=F64, device=device)
    first, second = direct(weight, 32, (3,), (3,), (1,), 0, spread=torch.tensor([1.0, 5.0], dtype=F64, device=device))
    norms = (first.square().sum((1, 2, 3)) * second.square().sum((1, 2, 3))).sqrt()  # free of the common factor
    assert float(norms[1] / norms[0]) == pytest.approx(5.0, rel=0.1)
    assert float(norms[0]) == pytest.approx((24 * 60 * 8 * (1 + 3)) ** 0.5, rel=0.1)
    assert float(compose(first, second).abs().max()) <= 1e-13


def test_each_factor_has_noise_of_its_own_that_cancels(device):
    """Taken back through P. 12 * 60 entries: a correlation has a standard deviation of 0.04."""
    weight = torch.zeros(1, 20, 20, 3, dtype=F64, device=device)
    first, second = direct(weight, 44, (3,), (3,), (1,), 0)
    p = mixing_matrix(44, 20)
    s, r = ((p.T @ rows.flatten(1).cpu())[20:] for rows in (first[0], second[0].transpose(0, 1)))
    assert float(torch.corrcoef(torch.stack([s[:12].flatten(), r[:12].flatten()]))[0, 1].abs()) < 0.2
    assert float((torch.corrcoef(s[:12]) - torch.eye(12, dtype=F64)).abs().max()) < 0.5
    for noise, sign in ((s, 1.0), (r, -1.0)):
        torch.testing.assert_close(noise[12:], sign * noise[:12], rtol=0, atol=1e-14 * float(noise.abs().max()))
        assert float(noise.mean().abs() / noise.std()) < 0.2


@pytest.mark.parametrize("hidden", [1, 2, 7, 64, 65, 66, 130, 200])
def test_the_mixing_matrix_is_orthogonal(hidden):
    for held in {1, hidden // 2, hidden - 5, hidden - 4, hidden - 3, hidden - 2, hidden - 1, hidden}:
        if held > 0:
            unit = torch.eye(hidden, dtype=F64)
            p = mixing_matrix(hidden, held)
            torch.testing.assert_close(p @ p.T, unit, rtol=0, atol=1e-13)


@pytest.mark.parametrize("hidden", [5, 66, 68, 200, 605, 630, 2052])
def test_channels_are_dealt_evenly(hidden):
    for held in range(1, hidden + 1, 1 if hidden < 100 else 7):
        blocks = deal(hidden, held)
        assert [block.start for block in blocks[1:]] == [block.start + block.size for block in blocks[:-1]]
        assert sum(block.size for block in blocks) == hidden
        assert sum(block.held for block in blocks) == held
        assert sum(block.pairs for block in blocks) == (hidden - held) // 2
        assert max(block.size for block in blocks) <= min(SIDE, min(block.size for block in blocks) + 2)
        assert all(0 <= block.size - 2 * block.pairs - block.held <= 1 for block in blocks)
        assert shares_pairs(hidden, held) or len(blocks) == 1 or all(block.pairs for block in blocks)


@pytest.mark.parametrize(("held", "hidden"), [(20, 31), (60, 70), (66, 66), (131, 134)])
def test_kernels_mix_as_the_fallback_does(held, hidden, kernel_device):
    """Without noise, each factor is what P makes of G, or of the delta."""
    weight = noise(1, held, 3, dtype=F64, device=kernel_device)
    none = torch.full((1,), 1e-30, dtype=F64, device=kernel_device)
    first, second = direct(weight, hidden, (), (), (), 0, density=1e-30, spread=none)
    p = mixing_matrix(hidden, held)[:, :held]
    gain = float(second.norm() / held**0.5)
    torch.testing.assert_close(second[0].T.cpu(), p * gain, rtol=0, atol=1e-14 * gain)
    torch.testing.assert_close(first[0].cpu(), p @ weight[0].cpu() / gain, rtol=0, atol=1e-13 / gain)


def fill(weight, hidden, out_first, out_second, config=None):
    """Launch the kernels of a weight (1, Co, Ci, K) into two given tensors."""
    weight, one, two = (x.unsqueeze(3).unsqueeze(3) for x in (weight, out_first, out_second.transpose(1, 2)))
    tables = (
        mixing_table(weight.dtype, weight.device),
        dealing_table(hidden, weight.shape[1], weight.device),
    )
    seeds, scales = torch.tensor([5], device=weight.device), weight.new_tensor([[0.5, 1.5]])
    sums = None
    if shares_pairs(hidden, weight.shape[1]):
        sums = weight.new_full((1, groups_of(hidden, weight.shape[1]), 2, one[0, 0].numel()), torch.nan)
        direct_launch.launch_sums(weight, sums, one.shape[3:], (0, 0, 1), tables[1], config=config)
    arguments = {"tables": tables, "seeds": seeds, "scales": scales, "precision": "ieee", "config": config}
    direct_launch.launch_direct(weight, sums, one, weight.shape[1], (0, 0, 1), **arguments)
    direct_launch.launch_direct(None, None, two, weight.shape[1], (0, 0, 1), **arguments)


@pytest.mark.parametrize(("co", "hidden"), [(20, 40), (66, 69)])
def test_tiles_do_not_change_the_noise(co, hidden, kernel_device, monkeypatch):
    """One tile a program or a few; sums of at most 64 terms of size 1, in another order."""
    weight = noise(1, co, 31, 3, device=kernel_device)
    results = []
    for block_m, span, programs in ((32, 4, 1), (64, 32, 2048)):
        monkeypatch.setattr(direct_launch, "_PROGRAMS", programs)
        first, second = weight.new_full((1, hidden, 31, 5), torch.nan), weight.new_full((1, co, hidden, 3), torch.nan)
        fill(weight, hidden, first, second, direct_launch.DirectConfig(block_m, span, 4, 1))
        results.append((first, second))
    torch.testing.assert_close(*results, rtol=0, atol=64 * torch.finfo(F64).eps)


def permuted(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The same values, laid out in memory in another order of dimensions."""
    back = [order.index(dim) for dim in range(tensor.ndim)]
    return tensor.permute(*order).contiguous().permute(*back)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 0, 1), (2, 0, 3, 1)], ids=str)
def test_strides_change_nothing(order, kernel_device):
    weight = noise(1, 20, 9, 3, device=kernel_device)
    plain = weight.new_empty(1, 30, 9, 5), weight.new_empty(1, 20, 30, 3)
    fill(weight, 30, *plain)
    around = [torch.full([2 * n for n in out.shape], torch.nan, dtype=F64, device=kernel_device) for out in plain]
    outs = [permuted(every, order)[:1, ::2, 1::2, 1 : 1 + n.shape[3]] for every, n in zip(around, plain, strict=True)]
    fill(permuted(weight, order), 30, *outs)
    torch.testing.assert_close(tuple(outs), plain, rtol=0, atol=64 * torch.finfo(F64).eps)


def test_nothing_is_written_beside_an_output(kernel_device):
    weight = noise(1, 20, 9, 3, device=kernel_device)
    around = [torch.full(shape, torch.nan, dtype=F64, device=kernel_device) for shape in ((1, 64, 20, 9), (1, 24, 34, 3))]
    first, second = around[0][:, 1:31, 1:19:2, 2:7], around[1][:, 2:22, 1:31]
    fill(weight, 30, first, second)
    for out, every in ((first, around[0]), (second, around[1])):
        assert int(every.isfinite().sum()) == out.numel() == int(out.isfinite().sum())


def test_wide_offsets(kernel_device, monkeypatch):
    weight = noise(1, 20, 9, 3, device=kernel_device)
    plain = direct(weight, 30, (3,), (3,), (1,), 0)
    layout_of = direct_launch.layout_of
    monkeypatch.setattr(direct_launch, "layout_of", lambda *given: layout_of(*given)._replace(wide=True))
    torch.testing.assert_close(direct(weight, 30, (3,), (3,), (1,), 0), plain, rtol=0, atol=64 * torch.finfo(F64).eps)


@pytest.mark.parametrize(("co", "hidden"), [(5, 12), (66, 69)])
def test_an_item_is_the_same_alone_and_in_a_batch(co, hidden, device):
    weight = noise(3, co, 2, 2, device=device)
    batch = direct(weight, hidden, (2,), (1,), (0,), 40)
    again = direct(weight, hidden, (2,), (1,), (0,), torch.arange(40, 43, device=device))
    alone = direct(weight[1:2], hidden, (2,), (1,), (0,), 41)
    other = direct(weight[1:2], hidden, (2,), (1,), (0,), 42)
    for one, same, single, different in zip(batch, again, alone, other, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one[1:2], single)
        assert not torch.isclose(single, different).any(0).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("batch", "co", "ci"), [(0, 2, 3), (1, 0, 3), (2, 2, 0), (1, 1, 1)])
def test_small_and_empty_sizes(batch, co, ci, device):
    first, second = direct(noise(batch, co, ci, 3, device=device), 4, (3,), (2,), (0,), 0)
    assert first.shape == (batch, 4, ci, 3)
    assert second.shape == (batch, co, 4, 2)
    assert bool(first.isfinite().all())
    assert bool(second.isfinite().all())


def test_opcheck(device):
    weight = permuted(noise(2, 5, 3, 3, dtype=F32, device=device), (2, 0, 3, 1))
    assert not weight.is_contiguous()
    seeds = torch.arange(2, device=device)
    arguments = (weight, 9, [3], [2], [0], seeds, None, 1.0, "ieee", True)
    torch.library.opcheck(torch.ops.fastmorph_kernels.direct.default, arguments)


def test_compiles_into_one_graph(kernel_device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def double(weight: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = direct(weight, 2 * weight.shape[1], (3,), (3,), (1,), seeds)
        return first * 2, second

    for batch, co, ci in ((2, 8, 6), (5, 7, 4)):  # sizes that are equal by chance would become a guard
        weight, seeds = noise(batch, co, ci, 3, device=kernel_device), torch.arange(batch, device=kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            first, second = double(weight, seeds)
        assert residual(weight, first / 2, second, (1,)) <= BOUND[F64]


GOOD = {"hidden_channels": 8, "k1": (3,), "k2": (3,), "before": (1,), "seed": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": (3, 3)}, r"1 spatial dimensions, but k1 is \(3, 3\)"),
        ({"k1": (2,)}, r"must fit into k1 = \(2,\).* into_first=False"),
        ({"k2": (2,), "into_first": False}, r"must fit into k2 = \(2,\)"),
        ({"k2": (0,)}, "no size may be 0"),
        ({"hidden_channels": 3}, "hidden_channels = 3, but a weight .* needs at least 4"),
        ({"hidden_channels": 4, "into_first": False}, "needs at least 5"),
        ({"before": (3,)}, r"before = \(3,\) does not lie in the frame"),
        ({"density": 0.0}, r"density = 0.0 must lie in \(0, 1\]"),
        ({"precision": "fp8"}, "one of ieee, tf32, tf32x3"),
        ({"seed": torch.arange(3)}, "seed must have one entry for each of 2 items"),
        ({"spread": torch.ones(2, 1)}, "spread must have one entry for each of 2 items"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        direct(torch.zeros(2, 4, 5, 3), **{**GOOD, **change})


def test_wrong_dtypes_and_ranks_are_refused():
    with pytest.raises(TypeError, match="float32, float64, bfloat16 or float16"):
        direct(torch.zeros(2, 4, 5, 3, dtype=torch.int64), **GOOD)
    with pytest.raises(TypeError, match="an int or int64"):
        direct(torch.zeros(2, 4, 5, 3), **{**GOOD, "seed": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"unsqueeze\(\)"):
        direct(torch.zeros(4, 5), **GOOD)


@pytest.mark.parametrize(
    ("co", "hidden"), [(5, 12), (5, 13), (5, 5), (40, 40), (40, 41), (66, 69), (70, 140), (131, 134), (130, 150)]
)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_kernels_and_plain_pytorch_give_one_answer(co, hidden, dtype, kernel_device, monkeypatch):
    """One P and one noise: sums of at most 64 terms, about as large as the largest entries, in another order."""
    weight = noise(2, co, 3, 2, 3, dtype=dtype)
    for into_first in (True, False):
        given, sizes = (weight, ((3, 3), (2, 1))) if into_first else (weight.transpose(1, 2), ((2, 1), (3, 3)))
        arguments = (hidden, *sizes, (1, 0), 7)
        ours = direct(given.to(kernel_device), *arguments, into_first=into_first, precision="ieee")
        with monkeypatch.context() as patched:
            patched.setattr(support, "interpreted", lambda: False)
            plain = direct(given, *arguments, into_first=into_first)
        for one, other in zip(ours, plain, strict=True):
            atol = 64 * torch.finfo(dtype).eps * float(other.abs().max())
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=atol)
