"""A vocabulary in slices on two processes: the results of the whole one. Runs in ranks.py; here it is only judged."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from opsd_kernels import Divergence, Head, TopK, VocabShard, fused_token_kl
from tests.kernels import cases, ranks

SIZES = (600, cases.V - 600)


def shard(sizes=SIZES):
    return VocabShard(dist.group.WORLD, sizes)


def mine(x, sizes=SIZES):
    """This rank's slice of a head or bias."""
    return x.split(sizes)[dist.get_rank()].contiguous()


def sliced(divergence, **options):
    """As cases.fused, from whole heads; their gradients arrive in the slices of the whole."""

    def function(student, head, teacher, teacher_head):
        sides = [
            Head(mine(head), shard=shard()),
            None if teacher_head is None else Head(mine(teacher_head), shard=shard()),
        ]
        return fused_token_kl(student, sides[0], teacher, sides[1], divergence=divergence, **options)

    return function


def same_on_every_rank(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    assert all(torch.equal(part, parts[0]) for part in parts)


def whole(results):
    """With the head's gradient of every rank: each has it in its own slice, zeros elsewhere."""
    for name in ("value", "hidden"):
        same_on_every_rank(results[name])
    if "head" in results:
        dist.all_reduce(results["head"])
    return results


def check_divergence(kind):
    for dtype in (torch.float32, torch.bfloat16):
        for shared in (True, False):
            inputs, truth, eager = cases.references(kind, dtype, shared)
            for trainable in (True, False):
                found = whole(cases.differentiate(sliced(cases.ALL[kind]), inputs, trainable))
                cases.check(found, truth, eager, dtype, signed="clipped" in kind)


def check_statistics():
    inputs = cases.mixture(torch.float32, shared=False)
    tokens = torch.arange(cases.N) * 22  # in both slices
    tokens[3], tokens[4] = -100, cases.V
    operands = (inputs.student_hidden, inputs.head, inputs.teacher_hidden, inputs.teacher_head)
    for divergence in (Divergence("jsd", temperature=0.7, clip=1e-3), Divergence(teacher_temperature=1.3)):
        options = {"tokens": tokens, "return_stats": True}
        value, stats = sliced(divergence, workspace_mib=0.6, **options)(*operands)  # several slabs
        expected, truth = fused_token_kl(*operands, divergence=divergence, backend="torch", **options)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        for name, found in stats._asdict().items():
            if found is not None:
                torch.testing.assert_close(found, getattr(truth, name), rtol=1e-5, atol=1e-6, equal_nan=True)
        assert stats.student_logprob[4].isnan()
        assert stats.student_logprob[3] == 0


def check_forms():
    """Bias, scale, softcap and padding of the head; the last slice has padding, the first none."""
    inputs = cases.mixture(torch.float32, shared=False)
    kept = cases.V - 75
    bias = (torch.arange(cases.V).remainder(7).sub(3) / 4).requires_grad_()
    weight, student = inputs.head.clone().requires_grad_(), inputs.student_hidden.clone().requires_grad_()
    form = {"scale": 1.3, "softcap": 6.0, "valid_vocab": kept}
    results = []
    for cut, where in ((mine, shard()), (lambda x: x, None)):
        head = Head(cut(weight), cut(bias), **form, shard=where)
        teacher_head = Head(cut(inputs.teacher_head), valid_vocab=kept, shard=where)
        value = fused_token_kl(student, head, inputs.teacher_hidden, teacher_head, backend="torch")
        grads = torch.autograd.grad((value * inputs.upstream).sum(), (student, weight, bias))
        results.append([value.detach(), *grads])
    for grad in results[0][2:]:
        dist.all_reduce(grad)
        assert not grad[kept:].any()
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def check_chunks():
    """Ranks with unlike slices agree on the rows of a chunk, here some dozens of chunks and slabs."""
    inputs = cases.mixture(torch.float32, shared=False, n=300)
    plain = cases.differentiate(cases.fused(Divergence(), "torch"), inputs)
    found = whole(cases.differentiate(sliced(Divergence(), workspace_mib=0.6), inputs))
    for name, expected in plain.items():
        assert (found[name] - expected).norm() <= 1e-5 * expected.norm()


def check_even_slices_need_no_sizes():
    inputs = cases.mixture(torch.float32, shared=True)
    even = inputs.head[:1000]
    head = Head(mine(even, (500, 500)), shard=VocabShard(dist.group.WORLD))
    expected = fused_token_kl(inputs.student_hidden, even, inputs.teacher_hidden)
    torch.testing.assert_close(
        fused_token_kl(inputs.student_hidden, head, inputs.teacher_hidden), expected, rtol=1e-5, atol=1e-7
    )
    identical = fused_token_kl(inputs.student_hidden, head, inputs.student_hidden, divergence="jsd")
    assert not identical.any()


def check_one_rank_holds_what_the_teacher_excludes():
    inputs = cases.mixture(torch.float32, shared=True)
    top = (inputs.student_hidden @ inputs.head.mT).argmax(dim=1)
    bias = torch.zeros(cases.V).index_fill(0, top[:2], -torch.inf)
    for divergence in ("jsd", "forward_kl"):
        sides = [Head(mine(inputs.head), shard=shard()), Head(mine(inputs.head), mine(bias), shard=shard())]
        found = fused_token_kl(inputs.student_hidden, sides[0], inputs.teacher_hidden, sides[1], divergence=divergence)
        operands = (inputs.student_hidden, inputs.head, inputs.teacher_hidden, Head(inputs.head, bias))
        expected = fused_token_kl(*operands, divergence=divergence, backend="torch")
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def check_compiled():
    inputs = cases.mixture(torch.float32, shared=True, n=9)
    student, head = inputs.student_hidden.clone().requires_grad_(), mine(inputs.head).requires_grad_()
    where, results = shard(), []

    def step(student, head, teacher):
        return fused_token_kl(student, Head(head, shard=where), teacher).sum()

    for call in (step, torch.compile(step, backend="eager", fullgraph=True)):
        results.append(torch.autograd.grad(call(student, head, inputs.teacher_hidden), (student, head)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def check_refusals():
    inputs = cases.mixture(torch.float32, shared=True)
    sides = (inputs.student_hidden, inputs.teacher_hidden)
    head = Head(mine(inputs.head), shard=shard())
    for make, message in [
        (lambda: shard((1003,)), "expected 2 positive sizes"),
        (
            lambda: fused_token_kl(sides[0], replace(head, shard=shard((500, 503))), sides[1]),
            "rows of head on this rank",
        ),
        (lambda: fused_token_kl(sides[0], replace(head, valid_vocab=600), sides[1]), "expected 2 positive sizes"),
        (lambda: fused_token_kl(sides[0], replace(head, valid_vocab=1004), sides[1]), "valid_vocab <= 1003"),
        (lambda: fused_token_kl(sides[0], head, sides[1], mine(inputs.head)), "expected teacher_head in the slices"),
        (lambda: fused_token_kl(sides[0], head, sides[1], backend="native"), "expected backend auto or torch"),
        (
            lambda: fused_token_kl(sides[0], head, sides[1], divergence=Divergence(support=TopK(5))),
            "over the whole vocabulary for a head in slices",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


ON_EVERY_RANK = {kind: partial(check_divergence, kind) for kind in cases.ALL} | {
    "statistics": check_statistics,
    "forms of the head": check_forms,
    "chunks": check_chunks,
    "even slices": check_even_slices_need_no_sizes,
    "excluded tokens": check_one_rank_holds_what_the_teacher_excludes,
    "compiled": check_compiled,
    "refusals": check_refusals,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return ranks.run(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ON_EVERY_RANK)
@pytest.mark.skipif(cases.INTERPRETED, reason="torch rows only")
def test_equals_the_whole_vocabulary(name, outcomes):
    for rank, outcome in enumerate(outcomes[name]):
        assert not outcome, f"rank {rank}: {outcome}"
