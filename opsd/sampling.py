"""From logits to a token: what may be drawn, the draw, its log-probability, and the random numbers behind it.

Everything stays on the logits' device: no shape depends on a value, so on an accelerator nothing here waits for it.

Letters: B rows decoded together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.config import RolloutConfig

_BLOCK = 256  # a token is found in two steps, its block of the vocabulary and its place there
_ONE_STEP = 1024  # or in one, in a vocabulary no larger than this
_CANDIDATES = 1024  # likeliest tokens in which a CPU looks for the nucleus before it sorts the vocabulary
_GOLDEN, _MIX_1, _MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature 0 is greedy; the other defaults leave the model's distribution alone."""

    group_size: int  # G
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # a response ends with the token after which its text contains one

    @staticmethod
    def of(config: RolloutConfig, greedy: bool = False) -> Sampling:
        if greedy:
            return Sampling.greedy(config.max_new_tokens, config.stop)
        return Sampling(
            config.group_size,
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.min_p,
            config.stop,
        )

    @staticmethod
    def greedy(max_new_tokens: int, stop: tuple[str, ...] = ()) -> Sampling:
        return Sampling(1, max_new_tokens, temperature=0.0, stop=stop)

    @property
    def as_it_is(self) -> bool:
        """Tokens are drawn from the model's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k is None and self.min_p == 0.0


def choose(
    logits: Tensor,  # (B, V) fp32; the suppressed ids are set to -inf in it
    uniform: Tensor,  # (B,) fp64 in [0, 1)
    sampling: Sampling,
    suppressed: Tensor,  # (S,) int64, ids that are never drawn
) -> tuple[Tensor, Tensor]:  # (B,) int64, (B,) fp32
    """The next token of every row, and log pi(token) of the model as it is trained.

    token:   the likeliest at temperature 0, else the first, in the order of ids, whose cumulative probability exceeds
             `uniform` under softmax(keep(logits / temperature)).
    logprob: log softmax(logits)[token] over the whole vocabulary, before temperature, filters and suppression: what
             `opsd.objectives.logprobs.token_logprobs` and the statistics of the divergence make of the same logits,
             so that the importance ratio of a response that was just sampled is 1.

    Probabilities are fp32. Their sums over blocks are accumulated in fp64, because an fp32 running sum over 150k ids
    would shift the tail by more than its own probability.
    """
    unseen = logits.index_select(1, suppressed).logsumexp(-1)
    logits.index_fill_(1, suppressed, -torch.inf)
    probability = logits.softmax(-1)
    if sampling.temperature == 0.0:
        token = _likeliest(logits)
    elif sampling.as_it_is:
        token = _draw(probability, uniform)
    else:
        token = _draw(keep(logits / sampling.temperature, sampling).softmax(-1), uniform)
    # The largest probability is exp(0) / sum: the log-sum-exp comes without another pass of exponentials.
    top, log_sum = logits.amax(-1), -probability.amax(-1).log()
    chosen = logits.gather(1, token)[:, 0] - top - log_sum
    return token[:, 0], chosen - torch.nn.functional.softplus(unseen - top - log_sum)


def keep(
    scores: Tensor,  # (B, V) fp32, logits / temperature
    sampling: Sampling,
) -> Tensor:  # (B, V), -inf on what is left out
    """Top-k, then top-p of what is left, then min-p of what is left: the order and the sets of transformers.

    top-k: all that is no less than the k-th largest, so a tie there keeps more than k.
    top-p: ids leave from the least likely upwards while their cumulative probability is <= 1 - top_p; one always
           stays. Of equal ones the smaller id leaves first, which transformers leaves to its sort.
    min-p: probability no less than min_p times the largest.
    """
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1.0:
        scores = _nucleus(scores, sampling.top_p)
    if sampling.min_p > 0.0:
        probability = scores.softmax(-1)
        scores = scores.masked_fill(probability < sampling.min_p * probability.amax(-1, keepdim=True), -torch.inf)
    return scores


def uniforms(
    seeds: Tensor,  # int64
    g: Tensor,  # int64, place of the response among those of its prompt
    step: Tensor,  # int64, place of the token in its response
) -> Tensor:  # fp64 in [0, 1), 53 bits; the three broadcast
    """The number that draws token `step` of response g of the prompt with this seed: no state, whatever the batch.

    u = (mix(stream + (step + 1) * 0x9E3779B97F4A7C15) >> 11) / 2^53,    stream = mix(mix(seed) + g),    modulo 2^64
    that is, output `step` of a SplitMix64 generator started at `stream`; mix is its finaliser (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", OOPSLA 2014, variant 13 of Stafford).
    """
    stream = _mix(_mix(seeds) + g)
    return _shift(_mix(stream + (step + 1) * _GOLDEN), 11).double() * 2.0**-53


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    if scores.device.type != "cpu" or scores.shape[-1] <= _CANDIDATES:
        ordered, index = scores.sort(dim=-1, stable=True)
        return _without(ordered.softmax(-1).cumsum(-1) <= 1 - top_p, ordered, index, scores.shape[-1])
    # Sorting the vocabulary is slow here and looking at a value is free: sort the few rows that need it.
    index = scores.topk(_CANDIDATES, dim=-1, sorted=False).indices.sort(-1).values
    ordered, place = scores.gather(1, index).sort(dim=-1, stable=True)  # by score, then by id
    index = index.gather(1, place)
    probability = scores.softmax(-1).gather(1, index)
    others = (1.0 - probability.sum(-1, keepdim=True)).clamp_min(0.0)
    leaves = others + probability.cumsum(-1) <= 1 - top_p
    # Where the least candidate leaves with all its equals, so do the others: none of them is greater.
    flat = (~leaves & (ordered == ordered[:, :1])).any(-1).nonzero()[:, 0]
    kept = _without(leaves, ordered, index, scores.shape[-1])
    if len(flat):
        ordered, index = scores[flat].sort(dim=-1, stable=True)
        kept[flat] = _without(ordered.softmax(-1).cumsum(-1) <= 1 - top_p, ordered, index, scores.shape[-1])
    return kept


def _without(leaves: Tensor, ordered: Tensor, index: Tensor, size: int) -> Tensor:
    """The scores (B, size) from which the leaving ones are gone; the last, which is the largest, stays."""
    leaves[:, -1] = False
    kept = ordered.masked_fill(leaves, -torch.inf)
    return kept.new_full((kept.shape[0], size), -torch.inf).scatter_(1, index, kept)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B, 1) ids by inversion of the cumulative weights; an id of weight 0 is never drawn."""
    if weights.shape[-1] <= _ONE_STEP:
        upto = weights.double().cumsum(-1)
        return torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True).clamp_(max=upto.shape[-1] - 1)
    mass = _per_block(weights, torch.sum).double()
    upto = mass.cumsum(-1)
    target = uniform[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, target, right=True).clamp_(max=mass.shape[-1] - 1)
    share = (target - upto.gather(1, block)) / mass.gather(1, block) + 1.0  # of the block that lies before the target
    ids, inside = _in_block(weights, block, 0.0)
    upto = inside.double().cumsum(-1)
    target = share.clamp(0.0, 1.0 - 2.0**-53) * upto[:, -1:]
    place = torch.searchsorted(upto, target, right=True).clamp_(max=ids.shape[-1] - 1)
    return ids.gather(1, place)


def _likeliest(logits: Tensor) -> Tensor:
    """(B, 1) the first of the largest: an argmax by blocks, because torch's own is several times slower on a CPU."""
    block = _per_block(logits, torch.amax).argmax(-1, keepdim=True)
    ids, inside = _in_block(logits, block, -torch.inf)
    return ids.gather(1, inside.argmax(-1, keepdim=True))


def _per_block(rows: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """(B, V) -> (B, blocks of V), the last block as short as it is."""
    size = rows.shape[-1]
    count = size // _BLOCK
    blocks = reduce(rows[:, : count * _BLOCK].unflatten(1, (count, _BLOCK)), dim=-1)
    if size % _BLOCK:
        blocks = torch.cat([blocks, reduce(rows[:, count * _BLOCK :], dim=-1, keepdim=True)], dim=1)
    return blocks


def _in_block(rows: Tensor, block: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """Ids (B, _BLOCK) of one block a row, and what the row holds there; `beyond` past the end of the vocabulary."""
    last = rows.shape[-1] - 1
    ids = block * _BLOCK + torch.arange(_BLOCK, device=rows.device)
    inside = rows.gather(1, ids.clamp(max=last)).masked_fill(ids > last, beyond)
    return ids.clamp_(max=last), inside


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """z >> bits of an unsigned number: the sign does not come along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
