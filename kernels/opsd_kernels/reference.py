"""The definition, dense and in the dtype of its inputs: the truth of tests (in fp64) and the eager peer of benches."""

import math

import torch
from torch import Tensor

from opsd_kernels.divergence import Divergence

NOTHING = -1e4  # its exponential is 0 in every dtype, and 0 times it is 0, not NaN


def token_divergence(
    z_s: Tensor,  # (N, V) student logits
    z_t: Tensor,  # (N, V) teacher logits
    divergence: Divergence,
) -> Tensor:  # (N,)
    """Per-token divergence of divergence.py, from log_softmax. A logit of -inf counts as NOTHING."""
    log_p = torch.log_softmax(z_s.clamp_min(NOTHING) / divergence.temperature, dim=-1)
    log_q = torch.log_softmax(z_t.clamp_min(NOTHING) / divergence.temperature, dim=-1)
    return _clipped(_terms(log_p, log_q, divergence), divergence).sum(dim=-1)


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


def dense_token_kl(
    student_hidden: Tensor,  # (N, D)
    head: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (N, E)
    teacher_head: Tensor | None,  # (V, E); None: head
    divergence: Divergence,
) -> Tensor:  # (N,)
    """What fused_token_kl computes, with both (N, V) logits and everything autograd keeps of them."""
    with torch.no_grad():
        z_t = teacher_hidden @ (head if teacher_head is None else teacher_head).mT
    return token_divergence(student_hidden @ head.mT, z_t, divergence)


def by_products(
    z_s: Tensor,  # (N, V)
    z_t: Tensor,  # (N, V)
    divergence: Divergence,
    tokens: Tensor,  # (N,) int64
) -> dict[str, Tensor]:  # each (N,), named as in TokenStats
    top = z_s.argmax(dim=-1, keepdim=True)
    results = {"top1_agreement": (z_t.gather(1, top) == z_t.amax(dim=-1, keepdim=True))[:, 0].to(z_s.dtype)}
    for side, logits in (("student", z_s), ("teacher", z_t)):
        z = logits.detach().clamp_min(NOTHING) / divergence.temperature
        log_p = torch.log_softmax(z, dim=-1)
        results[f"{side}_entropy"] = -(log_p.exp() * log_p).sum(dim=-1)
        results[f"{side}_lse"] = z.logsumexp(dim=-1)
        results[f"{side}_logprob"] = log_p.gather(1, tokens[:, None])[:, 0]
    log_p, log_q = (torch.log_softmax(z.detach().clamp_min(NOTHING) / divergence.temperature, -1) for z in (z_s, z_t))
    terms = _terms(log_p, log_q, divergence)
    clipped = terms > _clipped(terms, divergence)
    results["clip_fraction"] = torch.where(clipped, log_p.exp(), 0.0).sum(dim=-1)
    return results
