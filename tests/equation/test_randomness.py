"""Noise from a counter: its words, its parts, its statistics, and seeds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from fastmorph_kernels import noise

import fastmorph as fm
from fastmorph.equation.randomness import Noise, Stream, draw_seed, draw_seeds

CPU = torch.device("cpu")
FAR = 2**33  # from here on words have another key
MASK = 2**64 - 1


def mix(key, number):
    """SplitMix64's finaliser, in Python's own integers."""
    x = (key + number * 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def level(key, index):
    """As the module's docstring has it, a value at a time."""
    word, low = index // 2, 2**32 - 1
    mixed = mix(key, word >> 32)
    x = (word * 0x9E3779B1 + (mixed & low)) & low
    x = ((x ^ x >> 16) * 0x7FEB352D & low) ^ mixed >> 32
    x = (x ^ x >> 15) * 0x846CA68B & low
    x ^= x >> 16
    half = x >> 16 * (index % 2) & 0xFFFF
    return half - 2**16 if half >= 2**15 else half


@pytest.mark.parametrize("start", [0, 1, 2**31 - 3, 2**32 - 1, FAR - 5, FAR + 1, 2**35 + 7])
@pytest.mark.parametrize("key", [0, 7, MASK])
def test_values_are_those_of_the_formula(key, start):
    expected = [level(key, index) for index in range(start, start + 9)]
    assert Stream(key).levels(start, start + 9).tolist() == expected
    filled = Stream(key).fill(torch.empty(9, dtype=torch.float64), start=start)
    torch.testing.assert_close(filled, (torch.tensor(expected).double() + 0.5) * (12**0.5 / 2**16), rtol=1e-15, atol=0)


@pytest.mark.parametrize("start", [0, 2**32 - 3, 2**33 - 64])
def test_tensor_code_makes_the_same_words(start):
    """What other devices run, here on the CPU."""
    keys = np.array([3, MASK, 2**63], np.uint64)
    ours = noise.words_on_device(keys, start, start + 64, CPU)
    assert np.array_equal(ours.numpy().view(np.uint32), noise.words_on_host(keys, start, start + 64))


def test_the_whole_is_its_parts():
    stream, size = Stream(5), 5 * noise.BLOCK + 3
    whole = stream.fill(torch.empty(size))
    for cuts in ([0, 1, 2, 1001, 2**16, 2**16 + 1, 2**17 - 1, size], [*range(0, size, 9973), size]):
        parts = [stream.fill(torch.empty(b - a), start=a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    table = whole[: 64 * 30].view(30, 64)
    strided = torch.empty(64, 30).T
    assert torch.equal(stream.fill(strided), table)


def test_blocks_do_not_matter(monkeypatch):
    def drawn():
        noise = Noise([3, 4], [2, 3], CPU, torch.float32)
        return [Stream(9).fill(torch.empty(1000)), noise(6, 7, 3), noise(40, 1), noise(1, 400)]

    whole = drawn()
    for block in (1, 3, 64):
        monkeypatch.setattr(noise, "BLOCK", block)
        assert all(torch.equal(one, two) for one, two in zip(drawn(), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_round_the_same_values(dtype):
    values = Stream(1).fill(torch.empty(1000, dtype=torch.float64), 0.3)
    rounded = Stream(1).fill(torch.empty(1000, dtype=dtype), 0.3)
    # Half an ulp; before, in float32, the factor and the product are rounded.
    torch.testing.assert_close(rounded.double(), values, rtol=torch.finfo(dtype).eps / 2 + 2**-23, atol=0)
    one, two = (Noise([1], [1], CPU, d)(8, 9) for d in (torch.float64, torch.float32))
    torch.testing.assert_close(one, two.double(), rtol=2**-23, atol=0)  # levels would differ by 2**-15 of the largest


def test_items_have_the_same_noise_alone_and_among_others():
    def noise(seeds, batches):
        return Noise(seeds, batches, CPU, torch.float64)

    among, alone = noise([1, 2, 3], [2, 3, 1]), noise([2], [3])
    for shape in ((4, 5), (3, 2, 3, 3)):
        assert torch.equal(among(*shape)[2:5], alone(*shape))
    some, one = among.of(torch.tensor([3, 0])), alone.of(torch.tensor([1]))
    assert torch.equal(some(4, 4)[:1], one(4, 4)), "of the draws of others an item knows nothing"
    assert np.array_equal(some.keys(2)[:1], one.keys(2))
    assert not torch.equal(among(4, 4)[0], among(4, 4)[0]), "each draw is another"
    assert noise([], [])(3, 4).shape == (0, 3, 4)
    assert noise([1], [2])(0, 4, 3).shape == (2, 0, 4, 3)


def test_a_draw_in_parts_is_the_whole_draw():
    """As the closed form draws it: a row is a stream of its own under the draw's key."""
    whole, parts = (Noise([1, 2], [1, 2], CPU, torch.float64) for _ in range(2))
    under = parts.keys(2)
    for draw, shape in enumerate(((6, 11, 3), (2, 2))):
        keys = noise.mix_keys(noise.mix_keys(under, np.uint64(draw))[:, None], np.arange(shape[0], dtype=np.uint64)).reshape(-1)
        row = math.prod(shape[1:])
        out = torch.full((len(keys), row), torch.nan, dtype=torch.float64)
        for at, stop in ((row // 2, row), (0, 1), (1, row // 2)):
            noise.fill(out[:, at:stop], keys, at, 1.0)
        assert torch.equal(out.view(3, *shape), whole(*shape))


def close(observed, variance, count):
    """Within 5 standard deviations of zero, for a mean of so many numbers of that variance: 1 of 1.7 million fails."""
    assert abs(float(observed)) < 5 * (variance / count) ** 0.5, float(observed)


COUNT = 2**20


@pytest.mark.parametrize("start", [0, 2**31, FAR])
@pytest.mark.parametrize("key", [0, 1, 2**40])
def test_moments_and_lags(key, start):
    x = Stream(key).fill(torch.empty(COUNT, dtype=torch.float64), start=start)
    close(x.mean(), 1.0, COUNT)
    close(x.square().mean() - 1, 0.8, COUNT)  # the fourth moment is 9 / 5
    close((x**4).mean() - 1.8, 9.0 - 1.8**2, COUNT)  # the eighth moment is 81 / 9
    for lag in (1, 2, 3, 4, 8, 9, 16, 27, 64, 576, 1024, 4608, 2**16):
        close((x[lag:] * x[:-lag]).mean(), 1.0, COUNT - lag)
        close(((x[lag:].square() - 1) * (x[:-lag].square() - 1)).mean(), 0.64, COUNT - lag)
    levels = Stream(key).levels(start, start + COUNT).long() + 2**15
    for bits, kept in ((levels >> 8, 256), (levels & 255, 256)):
        expected = COUNT / kept
        squares = (torch.bincount(bits, minlength=kept) - expected).square().sum() / expected
        close(squares - (kept - 1), 2 * (kept - 1), 1)  # chi squared


def test_streams_do_not_know_each_other():
    """Keys and seeds that differ in one bit, names that differ in a letter, numbers that follow each other."""
    base = Stream(3)
    streams = [base, *(Stream(3 ^ 1 << bit) for bit in (0, 1, 31, 32, 63)), base.of("a"), base.of("b"), *map(base.of, range(3))]
    noise = Noise([3, 4], [2, 1], CPU, torch.float64)(2, COUNT)
    rows = [stream.fill(torch.empty(COUNT, dtype=torch.float64)) for stream in streams] + list(noise.flatten(0, 1))
    rows.append(base.fill(torch.empty(COUNT, dtype=torch.float64), start=FAR))
    for i, one in enumerate(rows):
        for two in rows[:i]:
            for shift in (0, 1, 2):
                close((one[shift:] * two[: COUNT - shift]).mean(), 1.0, COUNT - shift)


def test_integers_below():
    bounds = np.repeat(np.array([1, 3, 1000, 2**31 - 1]), 3000)
    drawn = Stream(4).below(bounds)
    assert ((drawn >= 0) & (drawn < bounds)).all()
    for count, bound in ((3, bounds == 3), (1000, bounds == 1000)):
        close(drawn[bound].mean() - (count - 1) / 2, (count**2 - 1) / 12, 3000)
    assert np.array_equal(Stream(4).below(bounds[:5]), drawn[:5])


def test_seeds():
    assert draw_seed(7) == 7
    assert draw_seeds(7, 3)[:2] == draw_seeds(7, 2)
    assert len(set(draw_seeds(7, 100))) == 100
    assert draw_seeds([4, 5], 2) == [4, 5]
    numpy = draw_seed(np.random.default_rng(0))
    assert numpy == draw_seed(np.random.default_rng(0))
    one, two = (torch.Generator().manual_seed(0) for _ in range(2))
    assert draw_seeds(one, 2) == [draw_seed(two), draw_seed(two)]
    torch.manual_seed(0)
    first = draw_seed(None)
    torch.manual_seed(0)
    assert first == draw_seed(None)
    for wrong in (True, False, -1, 2**63, 1.0, "7", [4]):
        with pytest.raises(fm.MorphError, match="pass a seed from 0 to"):
            draw_seeds(wrong, 2)


def test_an_int_is_a_seed_everywhere():
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    one, two, other = (fm.decompose(weight, 9, generator=seed) for seed in (3, 3, 4))
    assert torch.equal(one.first, two.first)
    assert not torch.equal(one.first, other.first)
    many = fm.decompose_many([fm.Problem(weight, 9)] * 2, generator=3)
    assert torch.equal(many[0].first, one.first)
    assert not torch.equal(many[1].first, one.first)
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    grown, again = (fm.morph(conv, [fm.Deepen("")], generator=5) for _ in range(2))
    assert grown.history.seed == 5
    assert torch.equal(grown.model.first.weight, again.model.first.weight)
    with pytest.raises(fm.MorphError, match="pass a seed"):
        fm.decompose(weight, 9, generator=True)
