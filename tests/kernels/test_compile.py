"""torch.compile(fullgraph=True): one node forward, the results of the eager call."""

import pytest
import torch

from opsd_kernels import Divergence, Head, TopK, compiled, fused_token_kl
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the row kernel")


def step(student, weight, bias, teacher, token_weights):
    head = Head(weight, bias, softcap=8.0)
    divergence = Divergence("jsd", clip=1e-3)
    options = {"divergence": divergence, "token_weights": token_weights, "return_stats": True}
    value, stats = fused_token_kl(student, head, teacher, **options)
    return value.sum() * 2, stats.student_entropy


def plain(student, weight, bias, teacher, token_weights):
    return (fused_token_kl(student, weight, teacher) * token_weights).sum(), token_weights


def top_k(student, weight, bias, teacher, token_weights):
    value, stats = fused_token_kl(
        *(student, weight, teacher),
        divergence=Divergence("jsd", support=TopK(9, of="teacher")),
        token_weights=token_weights > 0.8,
        return_stats=True,
    )
    return value.sum(), stats.teacher_tail_mass


def two_heads(student, weight, bias, teacher, token_weights):
    """Every number that the operator carries, unlike its neighbours; and an upstream beside weights."""
    kept = len(weight) - 7
    teacher_head = Head(weight.detach().roll(1, 0), 0.5 + bias.detach(), scale=1.2, softcap=6.0, valid_vocab=kept)
    value, stats = fused_token_kl(
        *(student, Head(weight, bias, scale=0.7, valid_vocab=kept), teacher, teacher_head),
        divergence=Divergence("jsd", 0.3, 1.1, 0.9, 1e-3, support=TopK(9, tail=False)),
        token_weights=token_weights,
        tokens=torch.arange(len(student)),
        return_stats=True,
        workspace_mib=30,
    )
    return (value * token_weights.flip(0)).sum(), stats.student_logprob + stats.teacher_logprob + stats.teacher_lse


def masked(student, weight, bias, teacher, token_weights):
    """A token that is left out holds NaN."""
    mask = torch.arange(len(student)) != 4
    value = fused_token_kl(student.masked_fill(~mask[:, None], torch.nan), weight, teacher, token_weights=mask)
    return (value * token_weights).sum(), value.detach()


@pytest.mark.parametrize(
    "function",
    [step, plain, top_k, two_heads, masked],
    ids=["options", "arbitrary upstream", "top-k and mask", "two heads", "masked NaN"],
)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_node_with_eager_results(function, trainable, dtype):
    torch._dynamo.reset()
    inputs = cases.mixture(dtype, shared=True, n=9)
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    results = []
    for call in (function, torch.compile(function, backend=backend, fullgraph=True)):
        student = inputs.student_hidden.clone().requires_grad_()
        head = inputs.head.clone().requires_grad_(trainable)
        bias = torch.zeros(cases.V, dtype=dtype, requires_grad=trainable and function in (step, two_heads))
        total, other = call(student, head, bias, inputs.teacher_hidden, inputs.upstream)
        total.backward()
        results.append([total.detach(), other.detach(), student.grad, head.grad, bias.grad])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "fused_token_kl" in str(node.target)]
    assert len(nodes) == 1


def test_an_upstream_of_0_outweighs_an_infinite_token():
    """The teacher excludes what the first student has most of: no gradient, which times 0 is 0."""
    inputs = cases.mixture(torch.float32, shared=True, n=3)
    student, head = inputs.student_hidden.requires_grad_(), inputs.head
    bias = torch.zeros(cases.V).index_fill(0, (student[:1] @ head.mT).argmax(dim=1), -torch.inf)
    call = torch.compile(fused_token_kl, backend="eager", fullgraph=True)
    value = call(student, head, inputs.teacher_hidden, Head(head, bias))
    assert value[0] == torch.inf
    value[1:].sum().backward()
    assert not student.grad[0].any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("upstream", [torch.ones(5), torch.arange(5.0)], ids=["uniform", "arbitrary"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_a_teacher_of_inference_mode(backend, upstream, trainable):
    """A frozen head keeps nothing of it; a trained one says why it cannot."""
    torch._dynamo.reset()
    inputs = cases.mixture(torch.float32, shared=True, n=5)
    student, head = inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_(trainable)
    (expected,) = torch.autograd.grad(fused_token_kl(student, head, inputs.teacher_hidden), student, upstream)
    with torch.inference_mode():
        teacher, weights = inputs.teacher_hidden.clone(), torch.ones(5)
    call = torch.compile(fused_token_kl, backend=backend, fullgraph=True)
    if trainable:
        with pytest.raises(ValueError, match=r"expected a teacher, .* made under torch.no_grad .* got a tensor of"):
            call(student, head, teacher, token_weights=weights)
    else:
        (found,) = torch.autograd.grad(call(student, head, teacher, token_weights=weights), student, upstream)
        assert torch.equal(found, expected)


def test_without_gradients_none_are_formed(monkeypatch):
    inputs, wanted, run = cases.mixture(torch.float32, shared=True, n=5), [], compiled.sweep
    monkeypatch.setattr(compiled, "sweep", lambda ops, w, grads: wanted.append(bool(grads)) or run(ops, w, grads))
    sides = (inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_(), inputs.teacher_hidden)
    call = torch.compile(fused_token_kl, backend="eager", fullgraph=True)
    with torch.no_grad():
        value = call(*sides)
    assert torch.equal(call(*sides), value)
    assert wanted == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operator_is_what_it_says(dtype):
    """Shapes and dtypes of the fake implementations, of the backward's too."""
    inputs = cases.mixture(dtype, shared=True, n=5)
    student, head = inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_()
    numbers = [0.5, 1.0, 1.0, float("inf"), 1.0, float("inf"), 1.0, float("inf"), 600.0]
    arguments = (student, head, None, inputs.teacher_hidden, None, None, None, None, [True, True, False])
    for support in ([0, 0, 0], [5, 1, 0]):
        settings = ("jsd", "auto", "", numbers, [cases.V, cases.V, *support])
        torch.library.opcheck(torch.ops.opsd.fused_token_kl.default, (*arguments, *settings))
        found = torch.ops.opsd.fused_token_kl(*arguments, *settings)[2:]
        operands = (torch.rand(5), *(x.detach() for x in found), student.detach(), head.detach(), *arguments[2:])
        check = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.opsd.fused_token_kl_backward.default, (*operands, *settings), test_utils=check)


@pytest.mark.parametrize("node", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_second_derivative_says_why_not(trainable, node):
    inputs = cases.mixture(torch.float32, shared=True, n=5)
    student, head = inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_(trainable)
    weights = torch.ones(5, requires_grad=True)
    call = torch.compile(fused_token_kl, backend="eager", fullgraph=True) if node else fused_token_kl
    value = (call(student, head, inputs.teacher_hidden) * weights).sum()
    (grad,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_check_that_reads_values_is_refused():
    inputs = cases.mixture(torch.float32, shared=True, n=5)
    call = torch.compile(fused_token_kl, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected check_finite=False under torch"):
        call(inputs.student_hidden, inputs.head, inputs.teacher_hidden, check_finite=True)
