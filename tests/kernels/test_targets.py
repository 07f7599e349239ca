"""Accuracy of fused_token_kl in numbers: the lines of bench/accuracy.py, on a small mixture.

What does not depend on the mixture, such as runs that repeat to the bit, is in test_op.py.
"""

import pytest

from bench.accuracy import Setting, chunks, given_logits, gradients
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="too large for the interpreter")
SHAPE = (96, 4003, 64)
every_backend = pytest.mark.parametrize("backend", ["native", "torch"])


@pytest.fixture(params=cases.DIVERGENCES)
def kind(request):
    return request.param


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def shared(request):
    return request.param


def hold(findings, count):
    found = list(findings)
    assert len(found) == count
    assert not [one for one in found if not one.ok]


@every_backend
def test_gradients_are_at_the_floor_of_bf16_and_no_worse_than_eager_in_fp32(kind, dtype, shared, backend):
    setting = Setting(kind, dtype, shared, SHAPE, backend)
    values = setting.truth()["value"]
    assert values.quantile(0.1) < 1e-3
    assert values.quantile(0.99) > 0.05
    hold(gradients(setting), 4 if dtype == "bf16" else 7)


@every_backend
def test_divergence_of_given_logits(kind, dtype, shared, backend):
    hold(given_logits(Setting(kind, dtype, shared, SHAPE, backend)), 2)


@every_backend
def test_the_size_of_a_chunk(kind, dtype, shared, backend):
    hold(chunks(Setting(kind, dtype, shared, SHAPE, backend)), 3)
