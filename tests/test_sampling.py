"""From logits to a token: kept sets equal transformers' own, frequencies pass chi-square, no value is looked at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd.sampling import Sampling, choose, keep, uniforms

NONE = torch.tensor([], dtype=torch.int64)
FILTERS = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "tight top_p": {"top_p": 1e-6},
    "top_p of nothing": {"top_p": 1e-9},  # 1 - top_p is 1 in fp32
    "top_p when it is cold": {"temperature": 0.25, "top_p": 0.5},
    "wide top_p": {"top_p": 0.999},
    "min_p": {"min_p": 0.1},
    "min_p of the likeliest": {"min_p": 1.0},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
}
filters = pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)


def below_one_in_a_thousand(statistic: float, freedom: int) -> bool:
    """Chi-square under its 99.9 % point (Wilson and Hilferty's approximation)."""
    return statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return ((counts - expected) ** 2 / expected).sum().item()


def numbers(n: int, seed: int = 0) -> Tensor:
    return uniforms(torch.tensor(seed), torch.tensor(0), torch.arange(n))


def transformers_keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """Scores after transformers' processors, in the order in which `generate` lists them."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(NONE, logits)


@filters
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("size, spread", [(5, 1.0), (300, 3.0), (5000, 3.0), (5000, 0.1)])
def test_kept_ids_are_those_of_transformers(options, ties, size, spread):
    logits = torch.randn(24, size, generator=torch.Generator().manual_seed(size)) * spread
    logits[::3] *= 3  # peaked and flat rows in one batch
    if ties:
        logits = (logits * 2).round() / 2
    sampling = Sampling(1, 1, **options)
    got = keep(logits / sampling.temperature, sampling)
    want = transformers_keep(logits, sampling)
    if ties:  # transformers' sort leaves open which of equal ids goes: here it is the smaller
        for row, kept in zip((logits / sampling.temperature).tolist(), got.isfinite().tolist(), strict=True):
            least = min(score for score, stays in zip(row, kept, strict=True) if stays)
            of_least = [stays for score, stays in zip(row, kept, strict=True) if score == least]
            assert of_least == sorted(of_least)
        got, want = got.sort(-1).values, want.sort(-1).values
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", [4, 2048])
def test_an_id_at_which_the_rest_is_just_reached_leaves(size):
    """Equal ids of a power of two: every sum is exact. The smaller ones leave first."""
    kept = keep(torch.zeros(1, size), Sampling(1, 1, top_p=0.5))[0].isfinite()
    assert kept.tolist() == [False] * (size // 2) + [True] * (size // 2)


@filters
def test_sampled_frequencies_pass_chi_square(options):
    """600 ids: two whole blocks and a short one; one id is suppressed."""
    n, sampling, suppressed = 16_000, Sampling(1, 1, **options), torch.tensor([3])
    logits = torch.rand(600, generator=torch.Generator().manual_seed(1)) * 3
    allowed = logits.index_fill(0, suppressed, -torch.inf)[None]
    probability = transformers_keep(allowed, sampling)[0].double().softmax(0)
    parts = [choose(logits.repeat(len(u), 1), u, sampling, suppressed)[0] for u in numbers(n).split(4000)]
    counts = torch.cat(parts).bincount(minlength=600).double()
    kept = probability > 0
    assert counts[~kept].sum() == 0
    assert not kept[3]
    if kept.sum() > 1:
        assert below_one_in_a_thousand(chi_square(counts[kept], n * probability[kept]), int(kept.sum()) - 1)


@pytest.mark.parametrize("size", [1, 6, 255, 1024, 1025, 1280, 3000])
def test_the_draw_inverts_the_cumulative_probability(size):
    logits = torch.randn(500, size, generator=torch.Generator().manual_seed(size)) * 2
    u = numbers(500)
    token, _ = choose(logits.clone(), u, Sampling(1, 1), NONE)
    upto = logits.double().softmax(-1).cumsum(-1)
    after = upto.gather(1, token[:, None])[:, 0]
    before = after - logits.double().softmax(-1).gather(1, token[:, None])[:, 0]
    assert (before - 1e-6 <= u).all() and (u <= after + 1e-6).all()


@pytest.mark.parametrize("size", [4, 256, 700, 1300])
def test_extreme_uniforms_draw_the_first_and_the_last_possible_id(size):
    logits = torch.full((2, size), -torch.inf)
    logits[:, size // 3], logits[:, size - 2] = 0.0, 1.0
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, uniform, Sampling(1, 1), NONE)[0].tolist() == [size // 3, size - 2]


@pytest.mark.parametrize("size", [3, 256, 1000, 1500])
def test_greedy_takes_the_first_of_the_largest(size):
    logits = torch.randint(0, 6, (200, size), generator=torch.Generator().manual_seed(0)).float()
    token, _ = choose(logits.clone(), numbers(200), Sampling.greedy(1), torch.tensor([0]))
    assert token.tolist() == [row.index(max(row[1:]), 1) for row in logits.tolist()]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 2.0}, {"top_k": 3, "min_p": 0.2}])
def test_logprobs_are_those_of_the_unchanged_model(options):
    logits = torch.randn(50, 400, generator=torch.Generator().manual_seed(0)) * 4
    suppressed = torch.tensor([1, 7, 399])
    token, logprob = choose(logits.clone(), numbers(50), Sampling(1, 1, **options), suppressed)
    assert not torch.isin(token, suppressed).any()
    want = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), want, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.5}])
def test_a_suppressed_id_may_be_the_only_likely_one(options):
    logits = torch.tensor([[0.0, 500.0, 1.0, 0.5]]).repeat(300, 1)
    token, logprob = choose(logits.clone(), numbers(300), Sampling(1, 1, **options), torch.tensor([1]))
    assert set(token.tolist()) == ({2} if options.get("temperature") == 0 else {0, 2, 3})
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_the_ends_of_the_temperatures_a_config_may_name(temperature):
    """The likeliest token at one end, any token that is not suppressed at the other."""
    logits = 40 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(64).double() + 0.5) / 64
    token, _ = choose(logits.clone(), uniform, Sampling(1, 1, temperature), torch.tensor([7, 299]))
    logits[:, [7, 299]] = -torch.inf
    likeliest = token == logits.argmax(-1)
    assert likeliest.all() if temperature < 1 else likeliest.sum() < 8 and len(token.unique()) > 56
    assert not torch.isin(token, torch.tensor([7, 299])).any()


@pytest.mark.parametrize("options", [*FILTERS.values(), {"temperature": 0.0}], ids=[*FILTERS, "greedy"])
def test_no_shape_and_no_branch_depends_on_a_value_off_the_cpu(options):
    """Tensors on the meta device have no values: reading one, or a shape made of one, raises."""
    with torch.device("meta"):
        seeds, logits, suppressed = torch.empty(4).long(), torch.empty(4, 5000), torch.empty(3).long()
        with pytest.raises((RuntimeError, NotImplementedError)):
            logits.argmax().item()
        token, logprob = choose(logits, uniforms(seeds, seeds, seeds), Sampling(1, 1, **options), suppressed)
    assert token.shape == logprob.shape == (4,)


def reference_mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64():
    golden = 0x9E3779B97F4A7C15
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # seed 1234567
    assert [reference_mix((1234567 + i * golden) % 2**64) for i in (1, 2, 3)] == published
    for seed in (0, 1, 2**55 + 12345, 2**63 - 1):
        for g in (0, 7):
            stream = (reference_mix(reference_mix(seed) + g)) % 2**64
            want = [(reference_mix((stream + (t + 1) * golden) % 2**64) >> 11) / 2**53 for t in range(5)]
            assert uniforms(torch.tensor(seed), torch.tensor(g), torch.arange(5)).tolist() == want


@pytest.mark.parametrize("along", ["seeds", "g", "step"])
def test_uniforms_are_uniform_and_uncorrelated_along_every_axis(along):
    n, names = 100_000, ("seeds", "g", "step")
    u = uniforms(*(torch.arange(n) if name == along else torch.tensor(11) for name in names))
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    for scale in (1, 2**20):  # leading bits, and bits further down
        cells = ((u * scale % 1) * 1000).long().bincount(minlength=1000).double()
        assert below_one_in_a_thousand(chi_square(cells, torch.full_like(cells, n / 1000)), 999)
    pairs = ((u[:-1] * 30).long() * 30 + (u[1:] * 30).long()).bincount(minlength=900).double()
    assert below_one_in_a_thousand(chi_square(pairs, torch.full_like(pairs, (n - 1) / 900)), 899)
    for lag in (1, 2, 16):
        correlation = torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1].item()
        assert abs(correlation) < 3.3 / math.sqrt(n)
