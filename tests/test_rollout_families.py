"""Decoding in slots against `generate`, for every family, with the media it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opsd.model import LanguageModel
from opsd.rollout import Rollouts, rollout
from opsd.sampling import Sampling
from tests.families import AUDIO, END, FAMILIES, IMAGE, VIDEO, build, prompts
from tests.test_families import open_model

LENGTH = 12
SUPPRESSED = [IMAGE, VIDEO, AUDIO]


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=lambda family: family.name)
def setting(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.name)
    build(request.param).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "suppressed_ids", SUPPRESSED)
        model = open_model(folder, patch)
        model.module.float()
        asked = [replace(one, inputs=single(one.inputs)) for one in prompts(request.param)]
        if request.param.name == "gemma3":  # embeddings that drown the layers would repeat the last token for ever
            with torch.no_grad():
                model.module.get_input_embeddings().weight.mul_(0.05)
        if request.param.name == "phi":  # so would biases that drown their products
            with torch.no_grad():
                for name, p in model.module.named_parameters():
                    p.mul_(0.1 if name.endswith("bias") else 1.0)
        if request.param.name == "qwen3_omni_moe":
            # transformers pads a clip of under a second as far as the longest of its batch, and its convolutions see it
            asked = asked[1:]
        yield model, asked


def single(inputs):
    return {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}


def test_greedy_answers_are_those_of_generate(setting):
    model, asked = setting
    ours, theirs = [], []
    for slots in (1, 64):  # alone, and all at once
        out = rollout(model, asked, Sampling.greedy(LENGTH), [0] * len(asked), slots=slots)
        ours.append([row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)])
    for prompt in asked:
        generated = model.module.generate(
            **prompt.inputs, max_new_tokens=LENGTH, do_sample=False, suppress_tokens=SUPPRESSED, eos_token_id=END
        )
        theirs.append(generated[0, prompt.length :].tolist())
    assert ours == [theirs, theirs]
    assert len({token for answer in theirs for token in answer}) > 5, "a model that repeats itself would hide mistakes"


def test_sampled_answers_do_not_depend_on_company(setting):
    """Another order of the batch, fewer slots, no sharing: the same answers for the same seeds."""
    model, asked = setting
    sampling, seeds = Sampling(3, LENGTH), [11, 12, 13][: len(asked)]
    want = rollout(model, asked, sampling, seeds)
    turned = rollout(model, asked[::-1], sampling, seeds[::-1])
    few = rollout(model, asked, sampling, seeds, slots=2)
    plain = Rollouts(model, share_prefix=False)(asked, sampling, seeds)
    rows = torch.arange(3 * len(asked)).view(-1, 3).flip(0).flatten().tolist()
    for i, row in enumerate(rows):
        n = want.lengths[i]
        for other, at in ((turned, row), (few, i), (plain, i)):
            assert other.lengths[at] == n
            assert other.tokens[at, :n].tolist() == want.tokens[i, :n].tolist()
            torch.testing.assert_close(other.logprobs[at, :n], want.logprobs[i, :n], rtol=1e-5, atol=1e-5)
