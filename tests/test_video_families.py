"""Every family with real video files through its real processor: packed against plain in fp64, positions, generate."""

from __future__ import annotations

import pytest
import torch

from opsd.config import load_config
from opsd.engine import prefill, response_hidden
from opsd.loading import load_model
from opsd.prompts import Prompt, PromptBuilder
from opsd.responses import Responses
from opsd.rollout import rollout
from opsd.sampling import Sampling
from tests.families import Double, build
from tests.files import tone
from tests.processors import WITH_VIDEO, write_processor
from tests.test_prompts import example
from tests.videos import pictures, write_video


@pytest.fixture(scope="module", params=WITH_VIDEO)
def setting(request, tmp_path_factory):
    """The model as a run loads it, and three ragged prompts: two videos, a video and its own sound, text alone."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    build(WITH_VIDEO[name]).save_pretrained(folder)
    write_processor(folder, name)
    loud = write_video(folder / "loud.avi", pictures(12), rate=8, sound=tone(16000, 300, 1.5))
    short = write_video(folder / "short.mkv", pictures(8, 32, 32, seed=1), rate=8)  # times that fp32 holds exactly
    config = load_config(
        None, [f"model.path={folder}", "media.frames=4", "media.min_pixels=256", "media.max_pixels=768"]
    )
    model = load_model(config.model, engine=config.engine)
    model.module.get_decoder().config._experts_implementation = "eager"  # grouped GEMMs have no fp64
    sound = [{"type": "audio", "audio": loud}] if "audio" in WITH_VIDEO[name].media else []
    text = {"type": "text", "text": "how does she feel"}
    rows = [
        example({"type": "video", "video": loud}, text, {"type": "video", "video": short}, rationale="she smiles"),
        example(text, {"type": "video", "video": loud}, *sound, text, rationale="well"),
        example(text, rationale="she is happy"),
    ]
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    return model, [builder.student(row) for row in rows], [builder.teacher(row) for row in rows]


def doubled(prompts):
    wide = [{n: x.double() if n.startswith(("pixel", "input_f")) else x for n, x in p.inputs.items()} for p in prompts]
    return [Prompt(inputs, "") for inputs in wide]


def test_packed_is_plain(setting):
    model, student, teacher = setting
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(4, 45, (n,), generator=generator).tolist() for n in (3, 1, 5, 2, 4, 6)]
    responses = Responses.pack(tokens, 2, model.pad_id, model.device)
    model.module.double()
    try:
        for prompts in (doubled(student), doubled(teacher)):
            found = []
            for shared in (True, False):
                model.module.zero_grad()
                with Double():
                    hidden = response_hidden(model, prompts, responses, shared)
                    hidden.sin().sum().backward()
                grads = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
                found.append((hidden.detach(), grads))
            (packed, packed_grads), (plain, plain_grads) = found
            assert packed.dtype == torch.float64 and (packed - plain).norm() < 1e-9 * plain.norm()
            biggest = max(grad.norm() for grad in plain_grads.values())
            assert any("visual" in name and grad.norm() > 1e-6 * biggest for name, grad in plain_grads.items())
            for name, grad in plain_grads.items():
                assert (packed_grads[name] - grad).norm() < 1e-9 * grad.norm() + 1e-12 * biggest, name
    finally:
        model.module.float()


def test_positions_are_the_models_own_and_follow_the_clock(setting):
    model, student, teacher = setting
    for prompt in [*student, *teacher]:
        counted = model.forward(**prompt.inputs).positions
        counted = counted[:, 0] if counted is not None else torch.arange(prompt.length).expand(3, -1)
        assert torch.equal(model.positions(prompt).double(), counted.double())
        (stored,) = prefill(model, [prompt])
        assert stored.next_position == counted.max().item() + 1
    slow = dict(student[0].inputs)
    for name in {"second_per_grid_ts", "video_second_per_grid"} & slow.keys():
        slow[name] = 2 * slow[name]
        assert not torch.equal(model.positions(Prompt(slow, "")), model.positions(student[0]))


def test_greedy_is_generate(setting):
    model, student, _ = setting
    ours = rollout(model, student, Sampling.greedy(8), [0] * len(student))
    found = set()
    for prompt, tokens, length in zip(student, ours.tokens, ours.lengths, strict=True):
        out = model.module.generate(
            **prompt.inputs, max_new_tokens=8, do_sample=False, suppress_tokens=model.suppressed_ids
        )
        assert tokens[:length].tolist() == out[0, prompt.length :].tolist()
        found |= set(tokens[:length].tolist())
    assert len(found) > 2, "a model that repeats itself would hide mistakes"


def test_the_pictures_matter(setting):
    model, student, _ = setting
    responses = Responses.pack([[30, 31]], 1, model.pad_id, model.device)
    with torch.no_grad():
        base = response_hidden(model, student[:1], responses)
        pixels = student[0].inputs["pixel_values_videos"]
        changed = Prompt({**student[0].inputs, "pixel_values_videos": pixels.flip(0)}, "")
        assert (response_hidden(model, [changed], responses) - base).norm() > 1e-3 * base.norm()
