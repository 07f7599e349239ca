"""The definition, dense and in the dtype of its inputs: the truth of tests (in fp64) and the eager peer of benches."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from opsd_kernels.divergence import Divergence, TopK
from opsd_kernels.heads import Head

NOTHING = -1e4  # its exponential is 0 in every dtype, and 0 times it is 0, not NaN


def token_divergence(
    z_s: Tensor,  # (N, V) student logits
    z_t: Tensor,  # (N, V) teacher logits
    divergence: Divergence,
) -> Tensor:  # (N,)
    """Per-token divergence of divergence.py, from log_softmax. A logit of -inf counts as NOTHING."""
    log_p, log_q = _log_probs(z_s, z_t, divergence)
    log_p, log_q = _supported(log_p, log_q, divergence.support)
    return _clipped(_terms(log_p, log_q, divergence), divergence).sum(dim=-1)


def _log_probs(z_s: Tensor, z_t: Tensor, divergence: Divergence) -> list[Tensor]:
    sides = zip((z_s, z_t), divergence.temperatures, strict=True)
    return [torch.log_softmax(z.clamp_min(NOTHING) / temperature, dim=-1) for z, temperature in sides]


def _supported(log_p: Tensor, log_q: Tensor, support: TopK | None) -> tuple[Tensor, Tensor]:  # (N, V) each
    """Log-probabilities of the outcomes that are compared."""
    if support is None:
        return log_p, log_q
    kept = (log_p if support.of == "student" else log_q).topk(support.k, dim=-1).indices
    inside = [x.gather(1, kept) for x in (log_p, log_q)]
    if not support.tail:
        p, q = (x.log_softmax(dim=-1) for x in inside)
        return p, q
    outside = [x.scatter(1, kept, NOTHING).logsumexp(dim=-1, keepdim=True) for x in (log_p, log_q)]
    p, q = (torch.cat(parts, dim=-1) for parts in zip(inside, outside, strict=True))
    return p, q


def _terms(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:  # (N, V) each
    if divergence.kind == "reverse_kl":
        return _kl(log_p, log_q)
    if divergence.kind == "forward_kl":
        return _kl(log_q, log_p)
    b = divergence.beta
    log_m = torch.logaddexp(log_p + math.log1p(-b), log_q + math.log(b))
    return b * _kl(log_q, log_m) + (1 - b) * _kl(log_p, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return log_a.exp() * (log_a - log_b)


def _clipped(terms: Tensor, divergence: Divergence) -> Tensor:
    return terms if divergence.clip is None else terms.clamp(max=divergence.clip)


def dense_logits(hidden: Tensor, head: Tensor | Head) -> Tensor:  # (N, D), (V, D) -> (N, valid V)
    head = Head.of(head)
    z = hidden @ head.weight[: head.valid_vocab].mT
    z = head.scale * (z if head.bias is None else z + head.bias[: head.valid_vocab])
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense_token_kl(
    student_hidden: Tensor,  # (N, D)
    head: Tensor | Head,  # (V, D)
    teacher_hidden: Tensor,  # (N, E)
    teacher_head: Tensor | Head | None,  # (V, E); None: head
    divergence: Divergence,
) -> Tensor:  # (N,)
    """What fused_token_kl computes, with both (N, V) logits and everything autograd keeps of them."""
    with torch.no_grad():
        z_t = dense_logits(teacher_hidden, head if teacher_head is None else teacher_head)
    return token_divergence(dense_logits(student_hidden, head), z_t, divergence)


def by_products(
    z_s: Tensor,  # (N, V)
    z_t: Tensor,  # (N, V)
    divergence: Divergence,
    tokens: Tensor,  # (N,) int64
) -> dict[str, Tensor]:  # each (N,), named as in TokenStats
    top = z_s.argmax(dim=-1, keepdim=True)
    results = {"top1_agreement": (z_t.gather(1, top) == z_t.amax(dim=-1, keepdim=True))[:, 0].to(z_s.dtype)}
    log_p, log_q = _log_probs(z_s.detach(), z_t.detach(), divergence)
    for side, z, temperature, log in zip(
        ("student", "teacher"), (z_s, z_t), divergence.temperatures, (log_p, log_q), strict=True
    ):
        results[f"{side}_entropy"] = -(log.exp() * log).sum(dim=-1)
        results[f"{side}_lse"] = (z.detach() / temperature).logsumexp(dim=-1)
        results[f"{side}_logprob"] = log.gather(1, tokens[:, None])[:, 0]
    if divergence.support is not None:
        results["full_divergence"] = token_divergence(z_s, z_t, replace(divergence, support=None))
        with_tail = replace(divergence.support, tail=True)
        for side, log in zip(("student", "teacher"), _supported(log_p, log_q, with_tail), strict=True):
            results[f"{side}_tail_mass"] = log[:, -1].exp()
        log_p, log_q = _supported(log_p, log_q, divergence.support)
    terms = _terms(log_p, log_q, divergence)
    clipped = terms > _clipped(terms, divergence)
    results["clip_fraction"] = torch.where(clipped, log_p.exp(), 0.0).sum(dim=-1)
    return results
