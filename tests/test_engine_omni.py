"""The engine on a real Qwen2.5-Omni thinker with videos and voices: 3-axis positions, towers, generate, reload."""

from __future__ import annotations

import pytest
import torch

from opsd.affect.clips import TEST, write_split
from opsd.affect.tiny import TinySize, build
from opsd.config import load_config
from opsd.data import read_examples
from opsd.engine import prefill, response_hidden
from opsd.loading import load_model
from opsd.prompts import PromptBuilder
from opsd.responses import Responses
from opsd.rollout import rollout
from opsd.sampling import Sampling

SIZE = TinySize(width=32, inner=64, layers=2, heads=2, vision_width=32, audio_width=32)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni")
    rows = write_split(folder, TEST, seed=0, size=4)
    examples = read_examples(rows, load_config(None, ["model.path=x"]).data)
    texts = [t for e in examples for t in (e.rationale, e.answer, e.subtitle)]
    build(folder / "model", texts, SIZE, seed=0)
    media = ("media.frames=4", "media.min_pixels=2304", "media.max_pixels=2304")
    config = load_config(None, [f"model.path={folder / 'model'}", *media])
    model = load_model(config.model)
    torch.manual_seed(0)
    with torch.no_grad():  # larger weights: a flat model would hide a wrong position or a lost medium
        for p in model.module.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    # ragged: two student views and one longer teacher view in one batch
    return model, [builder.student(examples[0]), builder.teacher(examples[1]), builder.student(examples[2])]


def test_prompts_carry_video_and_audio(setting):
    model, prompts = setting
    ids = prompts[0].inputs["input_ids"][0].tolist()
    config = model.module.config
    assert ids.count(config.video_token_id) == 18 and ids.count(config.audio_token_id) > 4
    assert {"pixel_values_videos", "video_grid_thw", "video_second_per_grid"} <= prompts[0].inputs.keys()
    assert {"input_features", "feature_attention_mask"} <= prompts[0].inputs.keys()


def test_responses_continue_from_the_largest_position(setting):
    model, prompts = setting
    for prompt, stored in zip(prompts, prefill(model, prompts), strict=True):
        kwargs = {k: v for k, v in prompt.inputs.items() if k in ("input_ids", "attention_mask", "video_grid_thw")}
        kwargs["second_per_grids"] = prompt.inputs["video_second_per_grid"]
        audio = prompt.inputs["feature_attention_mask"].sum(-1)
        positions, _ = model.module.get_rope_index(**kwargs, audio_seqlens=audio)
        assert stored.next_position == positions.max().item() + 1 < prompt.length


@pytest.mark.parametrize("per_prompt, lengths", [(1, [3, 1, 5]), (2, [1, 4, 2, 2, 5, 1])])
def test_shared_prefix_equals_plain_on_media(setting, per_prompt, lengths):
    model, prompts = setting
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(20, 60, (n,), generator=generator).tolist() for n in lengths]
    responses = Responses.pack(words, per_prompt, model.pad_id, model.device)
    results = []
    for shared in (True, False):
        model.module.zero_grad()
        hidden = response_hidden(model, prompts, responses, shared)
        hidden.sin().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
        results.append((hidden.detach(), grads))
    (shared_hidden, shared_grads), (plain_hidden, plain_grads) = results
    torch.testing.assert_close(shared_hidden, plain_hidden, rtol=1e-4, atol=1e-4)
    assert any(n.startswith("visual") for n in plain_grads) and any(n.startswith("audio_tower") for n in plain_grads)
    for name, grad in plain_grads.items():
        error = ((shared_grads[name] - grad).norm() / grad.norm().clamp_min(1e-6)).item()
        assert error < 1e-3, (name, error)


def test_greedy_equals_generate_with_media(setting):
    model, prompts = setting
    ours = rollout(model, prompts, Sampling.greedy(8), [0] * len(prompts))
    for prompt, tokens, length in zip(prompts, ours.tokens, ours.lengths, strict=True):
        out = model.module.generate(
            **prompt.inputs, max_new_tokens=8, do_sample=False, suppress_tokens=model.suppressed_ids
        )
        assert tokens[:length].tolist() == out[0, prompt.length :].tolist()


def test_media_change_the_answer(setting):
    """A prefix that lost its video or sound would still pass the equality tests."""
    model, prompts = setting
    responses = Responses.pack([[30, 31]], 1, model.pad_id, model.device)
    base = response_hidden(model, prompts[:1], responses)
    for name in ("pixel_values_videos", "input_features"):
        inputs = dict(prompts[0].inputs)
        inputs[name] = inputs[name].flip(0, -1)
        changed = response_hidden(model, [type(prompts[0])(inputs, prompts[0].text)], responses)
        assert (changed - base).abs().max() > 1e-3, name


def test_frames_that_only_pad_the_clip_are_gone_and_do_not_matter(setting):
    model, prompts = setting
    mask = prompts[0].inputs["feature_attention_mask"]
    assert mask.all() and prompts[0].inputs["input_features"].shape[-1] == mask.shape[-1]
    extractor = model.processor.feature_extractor
    assert mask.shape[-1] < extractor.n_samples // extractor.hop_length
    padded = dict(prompts[0].inputs)
    for name in ("input_features", "feature_attention_mask"):
        padded[name] = torch.nn.functional.pad(padded[name], (0, 7))
    responses = Responses.pack([[30, 31]], 1, model.pad_id, model.device)
    with_padding = response_hidden(model, [type(prompts[0])(padded, prompts[0].text)], responses)
    torch.testing.assert_close(with_padding, response_hidden(model, prompts[:1], responses))
