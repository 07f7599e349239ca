"""What fused_token_kl, Divergence and Head refuse, and how they say it; what lies at the bounds is computed."""

import logging
from fractions import Fraction

import numpy as np
import pytest
import torch

from opsd_kernels import Divergence, Head, TopK, VocabShard, fused_token_kl, rows
from opsd_kernels.gather import full_head
from opsd_kernels.reference import dense_token_kl
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
INPUTS = cases.mixture(torch.float32, shared=False)
NOT_NUMBERS = [None, "1", True, float("nan"), float("inf"), -1.0, 0.0, 1e300, 1e-300, torch.tensor(1.0)]
NOT_TENSORS = [None, 3, [[1.0]], np.zeros((cases.N, cases.D), np.float32)]


def call(**changes):
    names = ("student_hidden", "head", "teacher_hidden", "teacher_head")
    arguments = {name: getattr(INPUTS, name) for name in names} | changes
    return fused_token_kl(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": torch.zeros(2, 3, 48)}, "expected student_hidden with 2 dimensions"),
        ({"head": torch.zeros(1003, 47)}, "expected student_hidden as wide as head, 47 columns, got 48"),
        ({"teacher_hidden": torch.zeros(44, 48)}, "expected one teacher_hidden row per student_hidden row"),
        ({"teacher_head": torch.zeros(1002, 48)}, "expected teacher_head with the vocabulary of head, 1003"),
        ({"teacher_head": torch.zeros(1003, 32)}, "expected teacher_hidden as wide as teacher_head"),
        ({"student_hidden": torch.zeros(45, 48).double()}, "expected student_hidden in float32, float16 or"),
        ({"head": torch.zeros(1003, 48).bfloat16()}, "expected student_hidden in the dtype of head"),
        ({"head": torch.zeros(1003, 48, device="meta")}, "expected head on the device of student_hidden"),
        ({"head": torch.zeros(0, 48)}, "expected a head with at least one row"),
        ({"head": None}, "expected a head as a tensor or a Head, got NoneType"),
        ({"teacher_head": np.zeros((1003, 48))}, "expected a head as a tensor or a Head, got ndarray"),
        ({"token_weights": torch.ones(44)}, r"expected token_weights of shape \(45,\)"),
        ({"token_weights": torch.ones(45, dtype=torch.int64)}, "expected floating-point token_weights or a bool"),
        ({"token_weights": torch.ones(45, requires_grad=True)}, "without requires_grad"),
        ({"tokens": torch.zeros(44, dtype=torch.int64)}, r"expected tokens of shape \(45,\) in int64"),
        ({"tokens": torch.zeros(45)}, r"in int64, got \(45,\) in torch.float32"),
        ({"divergence": "reverse-kl"}, "did you mean 'reverse_kl'"),
        ({"divergence": 3}, "expected a Divergence or its kind"),
        ({"backend": "cuda"}, "expected backend out of auto, triton, native, torch"),
        ({"backend": None}, "expected backend out of auto, triton, native, torch, got None"),
        ({"backend": "triton"}, "expected backend='triton' to be available for cpu tensors"),
        ({"workspace_mib": 0.001}, "expected workspace_mib >= "),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("found", NOT_TENSORS, ids=lambda x: type(x).__name__)
def test_operands_that_are_no_tensors(found):
    kind = type(found).__name__
    for name in ("student_hidden", "teacher_hidden", "token_weights", "tokens"):
        if found is not None or name.endswith("hidden"):
            with pytest.raises(ValueError, match=f"expected {name} as a tensor, got {kind}"):
                call(**{name: found})
    for name in ("head", "teacher_head"):
        with pytest.raises(ValueError, match=f"expected {name} as a tensor, got {kind}"):
            call(**{name: Head(found)})
        if found is not None:
            with pytest.raises(ValueError, match=f"expected the bias of {name} as a tensor, got {kind}"):
                call(**{name: Head(INPUTS.head, found)})


@pytest.mark.parametrize("found", NOT_NUMBERS, ids=repr)
def test_numbers_that_fp32_cannot_compute_with(found):
    for name in ("temperature", "teacher_temperature", "clip"):
        if found is not None or name == "temperature":
            with pytest.raises(ValueError, match=f"expected {name} as a number from 1e-"):
                Divergence(**{name: found})
    with pytest.raises(ValueError, match="expected scale of the head as a number from 1e-06 to 1e\\+06"):
        Head(INPUTS.head, scale=found)
    if found is not None:
        with pytest.raises(ValueError, match="expected softcap as a number from 1e-06 to 1e\\+06"):
            Head(INPUTS.head, softcap=found)
    with pytest.raises(ValueError, match="expected beta of jsd as a number from 1e-06 to 1 - 1e-06, got"):
        Divergence("jsd", beta=found)


@pytest.mark.parametrize("found", [None, "1", True, float("nan"), float("inf"), -1.0, 0.0, torch.tensor(600.0)])
def test_no_size_of_a_workspace(found):
    with pytest.raises(ValueError, match="expected a positive, finite workspace_mib, got"):
        call(workspace_mib=found)


class Group:
    """What a VocabShard asks of a process group."""

    def rank(self):
        return 0

    def size(self):
        return 2


def gathered(**options):
    with full_head(INPUTS.head, **options) as head:
        return head


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Divergence("js"), "expected a divergence kind out of"),
        (lambda: Divergence(None), "expected a divergence kind out of"),
        (lambda: Divergence("jsd", beta=1.0), "its limits are forward_kl and reverse_kl"),
        (lambda: Divergence(beta="half"), "expected beta of jsd as a number .*, got 'half'"),
        (lambda: Divergence(support=5), "expected support as a TopK or None, got 5"),
        (lambda: TopK(0), "expected a whole k >= 1 of TopK, got 0"),
        (lambda: TopK(2.5), "expected a whole k >= 1 of TopK, got 2.5"),
        (lambda: TopK(True), "expected a whole k >= 1 of TopK, got True"),
        (lambda: TopK(5, tail="no"), "expected a bool tail of TopK, got 'no'"),
        (lambda: TopK(5, of="both"), "expected TopK of student or teacher, got 'both'"),
        (lambda: Head(INPUTS.head, valid_vocab=900.0), "expected a whole valid_vocab or None, got 900.0"),
        (lambda: Head(INPUTS.head, valid_vocab=True), "expected a whole valid_vocab or None, got True"),
        (lambda: Head(INPUTS.head, shard=2), "expected shard as a VocabShard or None, got int"),
        (lambda: VocabShard(None), "expected a process group .*, got None"),
        (lambda: VocabShard(Group(), 5), "expected 2 positive sizes, one per rank of the group, got 5"),
        (lambda: VocabShard(Group(), (5,)), r"expected 2 positive sizes, one per rank of the group, got \(5,\)"),
        (lambda: VocabShard(Group(), "12"), "expected 2 positive sizes, one per rank of the group, got '12'"),
        (lambda: Divergence(np.ones(2)), "expected a divergence kind out of"),
        (lambda: Divergence(beta=None), "expected beta of jsd as a number .*, got None"),
        (lambda: TopK(5, of=np.ones(2)), "expected TopK of student or teacher, got array"),
        (lambda: call(backend=np.ones(2)), "expected backend out of auto, .*, got array"),
        (lambda: call(return_stats="no"), "expected a bool return_stats, got 'no'"),
        (lambda: call(check_finite=torch.tensor(True)), "expected a bool check_finite, got tensor"),
        (lambda: gathered(dtype="fp32"), "expected a torch.dtype or None, got 'fp32'"),
        (lambda: gathered(mean=1), "expected a bool mean, got 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_temperature_and_a_scale_that_are_too_much_together():
    message = r"temperature / scale of {}head from 1e-06 to 1e\+06, got 1e\+07"
    for name in ("head", "teacher_head"):
        changes = {name: Head(getattr(INPUTS, name), scale=1e-4)}
        call(**changes, divergence=Divergence(temperature=1e2))
        with pytest.raises(ValueError, match=message.format(name.removesuffix("head"))):
            call(**changes, divergence=Divergence(temperature=1e3))


def test_numbers_of_numpy_are_numbers():
    divergence = Divergence("jsd", np.float32(0.5), np.float64(1.0), clip=np.float32(0.5), support=TopK(np.int64(9)))
    head = Head(INPUTS.head, scale=np.float32(1), valid_vocab=np.int64(cases.V))
    found = call(head=head, divergence=divergence, workspace_mib=np.int64(600))
    assert torch.equal(found, call(divergence=Divergence("jsd", clip=0.5, support=TopK(9))))
    for number in (np.float64(0.5), np.float32(0.5), Fraction(1, 2)):  # and one that the sides do not share
        for other in ({"scale": number}, {"scale": number, "softcap": 20 * number}):
            plain = {name: float(x) for name, x in other.items()}
            found, expected = (call(head=Head(INPUTS.head, **x), teacher_head=INPUTS.head) for x in (other, plain))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("kind", cases.DIVERGENCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e6])
def test_the_bounds_of_the_temperature(backend, kind, shared, temperature):
    """Finite, and a mixture's divergence is at most that of sides that have nothing in common."""
    inputs = cases.mixture(torch.float32, shared)
    divergence = Divergence(kind, temperature=temperature)
    found = cases.differentiate(cases.fused(divergence, backend), inputs)
    assert all(x.isfinite().all() for x in found.values())
    truth = cases.differentiate(cases.dense(divergence), inputs.double())
    if kind == "jsd":
        torch.testing.assert_close(found["value"].double(), truth["value"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_the_bounds_of_beta(backend, beta):
    divergence = Divergence("jsd", beta=beta)
    found = call(divergence=divergence, backend=backend).double()
    sides = (INPUTS.student_hidden, INPUTS.head, INPUTS.teacher_hidden, INPUTS.teacher_head)
    truth = dense_token_kl(*(x.double() for x in sides), divergence)
    assert (found - truth).abs().max() < 0.1 * truth.max()


@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden"])
def test_hidden_states_that_are_not_finite(name):
    hidden = getattr(INPUTS, name).clone()
    hidden[3, 1], hidden[40, 0] = torch.nan, torch.inf
    value = call(**{name: hidden})
    assert value.isfinite().sum() == cases.N - 2
    with pytest.raises(ValueError, match=f"expected finite {name}, got NaN or infinity in 2 of its rows: 3, 40"):
        call(**{name: hidden}, check_finite=True)


def test_missing_library(monkeypatch, caplog, tmp_path):
    """Named: refused with the reason. auto: torch rows, said once."""
    from opsd_kernels import rows_native

    monkeypatch.setattr(rows_native, "LIBRARY", tmp_path / "_rows.so")
    monkeypatch.setattr(rows, "_announced", set())
    with pytest.raises(ValueError, match="reinstall with a C\\+\\+ compiler"):
        call(backend="native")
    with caplog.at_level(logging.INFO, "opsd_kernels"):
        call()
        call()
    assert [r.message for r in caplog.records if "torch row kernels" in r.message] == [
        "fused_token_kl uses torch row kernels on cpu (_rows.so was not built; "
        "reinstall with a C++ compiler and cmake on the PATH)"
    ]
