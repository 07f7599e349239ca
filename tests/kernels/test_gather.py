"""Heads that a trainer keeps in shards: gathered for the op, their gradients back in the shards.

DTensor and FSDP2 on two processes (ranks.py). DeepSpeed is not installed here: its part runs against a stand-in with
the interface that full_head uses, GatheredParameters and parameters with a ds_id.
"""

import contextlib
import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from opsd_kernels import Head, fused_token_kl
from opsd_kernels.gather import full_head
from tests.kernels import cases, ranks

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")


def loss_of(student, head, teacher, upstream):
    return (fused_token_kl(student, head, teacher, divergence="jsd") * upstream).sum()


def local_tokens():
    """This rank's part of the tokens, and the head whose whole gradient is known: the mean over the ranks."""
    inputs = cases.mixture(torch.float32, shared=True)
    rows = [torch.arange(cases.N) % dist.get_world_size() == rank for rank in range(dist.get_world_size())]
    bias = torch.linspace(-1, 1, cases.V)
    weight, expected_bias = inputs.head.clone().requires_grad_(), bias.clone().requires_grad_()
    losses = [
        loss_of(inputs.student_hidden[r], Head(weight, expected_bias), inputs.teacher_hidden[r], inputs.upstream[r])
        for r in rows
    ]
    expected = torch.autograd.grad(sum(losses) / len(losses), (weight, expected_bias))
    mine = rows[dist.get_rank()]
    own = (inputs.student_hidden[mine], inputs.teacher_hidden[mine], inputs.upstream[mine])
    return own, inputs.head, bias, losses[dist.get_rank()].detach(), expected


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).norm() <= tolerance * expected.norm()


def check_dtensor():
    (student, teacher, upstream), head, bias, value, expected = local_tokens()
    flat = init_device_mesh("cpu", (2,))
    for mesh, placements in (
        (flat, [Shard(0)]),  # 1003 rows: 502 and 501
        (flat, [Shard(1)]),
        (flat, [Replicate()]),
        (init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)]),
    ):
        sharded = Head(
            distribute_tensor(head, mesh, placements).requires_grad_(),
            distribute_tensor(bias, mesh, [Replicate()] * mesh.ndim).requires_grad_(),
        )
        for mean, factor in ((True, 1), (False, 2)):
            sharded.weight.grad = sharded.bias.grad = None
            with full_head(sharded, mean=mean) as whole:
                assert type(whole.weight) is torch.Tensor
                loss = loss_of(student, whole, teacher, upstream)
            loss.backward()
            torch.testing.assert_close(loss.detach(), value)
            assert isinstance(sharded.weight.grad, DTensor)
            assert sharded.weight.grad.placements == tuple(placements)
            assert_close(sharded.weight.grad.full_tensor(), factor * expected[0])
            assert_close(sharded.bias.grad.full_tensor(), factor * expected[1])


def check_cast_before_the_gather():
    (student, teacher, upstream), head, _, _, expected = local_tokens()
    weight = distribute_tensor(head, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    with full_head(weight, dtype=torch.bfloat16) as whole:
        assert torch.equal(whole.weight, head.bfloat16())
        loss_of(student.bfloat16(), whole, teacher.bfloat16(), upstream).backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.shape == expected[0].shape
    frozen = weight.detach()
    with full_head(frozen) as whole:
        assert not whole.weight.requires_grad
        assert torch.equal(whole.weight, head)


class Model(torch.nn.Module):
    """A body whose forward leaves the head out, as the op wants it."""

    def __init__(self, width, vocab):
        super().__init__()
        self.body, self.head = torch.nn.Linear(width, width), torch.nn.Linear(width, vocab, bias=False)

    def forward(self, x):
        return self.body(x)


def check_fsdp2(head_alone):
    inputs = cases.mixture(torch.float32, shared=True, n=40)
    torch.manual_seed(0)  # the same weights on both ranks
    plain, sharded = Model(cases.D, cases.V), Model(cases.D, cases.V)
    torch.nn.init.orthogonal_(plain.body.weight)
    plain.head.weight.data.copy_(inputs.head)
    sharded.load_state_dict(plain.state_dict())
    mesh = init_device_mesh("cpu", (2,))
    if head_alone:
        fully_shard(sharded.head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    parts = [slice(rank * 20, rank * 20 + 20) for rank in range(2)]
    for _ in range(2):  # the second step accumulates
        losses = [
            loss_of(
                *(plain(inputs.student_hidden[part]), plain.head.weight),
                *(plain(inputs.teacher_hidden[part]).detach(), inputs.upstream[part]),
            )
            for part in parts
        ]
        (sum(losses) / 2).backward()
        part = parts[dist.get_rank()]
        with torch.no_grad():
            teacher = sharded(inputs.teacher_hidden[part])
        student = sharded(inputs.student_hidden[part])
        with full_head(sharded.head.weight) as head:
            loss = loss_of(student, head, teacher, inputs.upstream[part])
        loss.backward()
        torch.testing.assert_close(loss.detach(), losses[dist.get_rank()].detach(), rtol=1e-4, atol=1e-6)
        for name, parameter in sharded.named_parameters():
            assert isinstance(parameter.grad, DTensor), name
            assert_close(parameter.grad.full_tensor(), plain.get_parameter(name).grad, 1e-4)


def check_refusal():
    weight = distribute_tensor(torch.zeros(8, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(ValueError, match=r"expected head as a whole tensor \(gather.full_head makes it one\)"):
        fused_token_kl(torch.zeros(2, 3), weight, torch.zeros(2, 3))


ON_EVERY_RANK = {
    "dtensor": check_dtensor,
    "cast": check_cast_before_the_gather,
    "fsdp2, head a unit": lambda: check_fsdp2(head_alone=True),
    "fsdp2, head of the root": lambda: check_fsdp2(head_alone=False),
    "refusal": check_refusal,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return ranks.run(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ON_EVERY_RANK)
def test_on_two_ranks(name, outcomes):
    for rank, outcome in enumerate(outcomes[name]):
        assert not outcome, f"rank {rank}: {outcome}"


@pytest.fixture
def partitioned(monkeypatch):
    """A head as ZeRO-3 leaves it, and a deepspeed that can gather it."""
    inputs = cases.mixture(torch.float32, shared=True)
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 7

    @contextlib.contextmanager
    def gather(parameters):
        assert [p is weight for p in parameters] == [True]
        weight.data = inputs.head.clone()
        yield
        weight.data = torch.empty(0)

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    return inputs, weight


def test_zero3(partitioned):
    inputs, weight = partitioned
    student, head = inputs.student_hidden.clone().requires_grad_(), inputs.head.clone().requires_grad_()
    expected = loss_of(student, head, inputs.teacher_hidden, 1.0)
    grads = torch.autograd.grad(expected, (student, head))
    with full_head(weight) as whole:
        loss = loss_of(student, whole, inputs.teacher_hidden, 1.0)
        found = torch.autograd.grad(loss, (student, weight))
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    weight.requires_grad_(False)
    with full_head(weight) as whole:
        loss = loss_of(student, whole, inputs.teacher_hidden, 1.0)
    assert weight.numel() == 0
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.equal(grad, grads[0])


def test_zero3_that_cannot_be_gathered(partitioned, monkeypatch):
    inputs, weight = partitioned
    with pytest.raises(ValueError, match="expected head as a whole tensor"):
        fused_token_kl(inputs.student_hidden, weight, inputs.teacher_hidden)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="expected deepspeed to be importable"), full_head(weight):
        pass


def test_a_plain_head_is_handed_on():
    weight = torch.zeros(5, 3, requires_grad=True)
    with full_head(weight) as head:
        assert head.weight is weight
    with full_head(Head(weight, torch.zeros(5), softcap=3.0), dtype=torch.bfloat16) as head:
        assert (head.weight.dtype, head.bias.dtype, head.softcap) == (torch.bfloat16, torch.bfloat16, 3.0)
