"""The packed pass: every prompt computed once, nothing padded. Rollout, teacher and student all run the model here.

The plain twin, `engine.share_prefix=false`, is opsd/plain.py: whole padded sequences, transformers' own attention;
results are equal.

Letters: B prompts, P prompt tokens, R responses, T tokens of one, N of all, S tokens of the packed row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd import plain
from opsd.attention import PackedKV
from opsd.model import LanguageModel
from opsd.packing import Packed, Tree, tokens_of
from opsd.prefix_entry import Stored
from opsd.prompts import PER_TOKEN, Prompt
from opsd.responses import Responses
from opsd.transfer import to_device


def response_hidden(
    model: LanguageModel, prompts: Sequence[Prompt], responses: Responses, share_prefix: bool = True
) -> Tensor:
    """Hidden states that predict each response token, response by response: (N, D). Differentiable."""
    if not share_prefix:
        return plain.response_hidden(model, prompts, responses)
    hidden, _ = forward(model, prompts, responses)
    return hidden


def prefill(model: LanguageModel, prompts: Sequence[Prompt]) -> list[Stored]:
    """Compute prompts alone and keep them."""
    _, stored = forward(model, prompts, None, keep=True)
    return stored


def forward(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    responses: Responses | None,
    known: Sequence[Stored | None] | None = None,
    keep: bool = False,
) -> tuple[Tensor, list[Stored]]:
    """One packed pass: states (N, D) that predict the responses, and (keep) the prompts it computed, in order.

    known: prompts computed before, which are then not computed again; None where there is none. Gradients do not
    reach them.
    """
    known = known if known is not None else [None] * len(prompts)
    lengths: list[list[int]] = [[] for _ in prompts]
    if responses is not None:
        assert list(responses.owners) == sorted(responses.owners), "responses lie prompt by prompt"
        for owner, length in zip(responses.owners, responses.lengths, strict=True):
            lengths[owner].append(length)
    packed = Packed(
        tuple(
            Tree(prompt.length, tuple(of_prompt), one is not None)
            for prompt, of_prompt, one in zip(prompts, lengths, known, strict=True)
        )
    )
    model.tokens.add(packed.length, packed.padded_length)
    fresh = [prompt for prompt, one in zip(prompts, known, strict=True) if one is None]
    older = [one for one in known if one is not None]
    carried = PackedKV(packed, older, keep, model.attention)
    if packed.length:
        ids = _ids(prompts, responses, packed, model.device)
        positions, media = _positions(model, prompts, packed, known), _media(fresh, model)
        with model.towers.serving(fresh):
            states = model.forward_packed(ids, positions, media, carried)
    else:  # every prompt is known and no response has a second token
        states = older[0].last_hidden.new_empty(0, older[0].last_hidden.shape[-1])
    every = torch.cat([states, *(one.last_hidden[None] for one in older)]) if older else states
    hidden = every.index_select(0, to_device(tokens_of(packed.predicting), model.device))
    return hidden, _kept(model, packed, carried, prompts, states) if keep else []


def _ids(prompts: Sequence[Prompt], responses: Responses | None, packed: Packed, device: torch.device) -> Tensor:
    """(1, S) token ids, gathered on the device from the prompts and the grid of responses."""
    in_row = [prompt for prompt, tree in zip(prompts, packed.trees, strict=True) if not tree.stored]
    pool = [prompt.inputs["input_ids"][0] for prompt in in_row]
    at, spans, response = 0, [], 0
    first_response = sum(map(len, pool))
    for tree in packed.trees:
        if not tree.stored:
            spans.append((at, tree.root))
            at += tree.root
        for fed in tree.children:
            assert responses is not None
            spans.append((first_response + response * responses.tokens.shape[1], fed))
            response += 1
    ids = [to_device(torch.cat(pool), device)] if pool else []
    ids += [responses.tokens.flatten()] if responses is not None else []
    return torch.cat(ids).index_select(0, to_device(tokens_of(spans), device))[None]


def _positions(
    model: LanguageModel, prompts: Sequence[Prompt], packed: Packed, known: Sequence[Stored | None]
) -> Tensor:
    """(axes, S): prompts as the family counts them, responses on from the largest position of any axis."""
    parts = []
    for prompt, tree, stored in zip(prompts, packed.trees, known, strict=True):
        if stored is None:
            own = model.positions(prompt)
            parts.append(own)
            start = own.max().item() + 1
        else:
            start = stored.next_position
        steps = start + tokens_of([(0, fed) for fed in tree.children])
        parts.append(steps.expand(model.axes, -1))
    return to_device(torch.cat(parts, 1), model.device)


def _media(prompts: Sequence[Prompt], model: LanguageModel) -> dict[str, Tensor]:
    """Everything the processor made but the tokens, prompt after prompt; audio padded to one length."""
    media: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.inputs):
        if name in PER_TOKEN:
            continue
        parts = [prompt.inputs[name] for prompt in prompts if name in prompt.inputs]
        if name in ("input_features", "feature_attention_mask"):
            width = max(part.shape[-1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
        media[name] = to_device(torch.cat(parts), model.device)
    return media


def _kept(
    model: LanguageModel, packed: Packed, carried: PackedKV, prompts: Sequence[Prompt], states: Tensor
) -> list[Stored]:
    kept = []
    for prompt, tree, (start, length) in zip(prompts, packed.trees, packed.roots, strict=True):
        if tree.stored:
            continue
        layers = [carried.kept[layer] for layer in sorted(carried.kept)]
        keys, values = ([x[:, start : start + length].clone() for x in side] for side in zip(*layers, strict=True))
        last = states[start + length - 1].clone()
        kept.append(Stored(keys, values, model.positions(prompt).max().item() + 1, last))
    return kept
