"""The teacher's prompts from the cache: exact, never stale, and the same to the bit whether found or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opsd.data import read_examples
from opsd.digests import model_identity
from opsd.engine import prefill, response_hidden
from opsd.group import micro_batches
from opsd.loading import load_model
from opsd.opening import open_run
from opsd.prefix_entry import Version
from opsd.prefix_store import open_store
from opsd.prompts import PromptBuilder
from opsd.responses import Responses
from opsd.step import sample, teach
from opsd.teacher import build_teacher, score
from opsd.teacher_cache import TeacherCache
from tests.families import FAMILIES, Double, build
from tests.families import prompts as prompts_of
from tests.jobs import text_job
from tests.test_families import open_model, responses_of


@pytest.fixture
def setting(tmp_path):
    config = text_job(tmp_path)
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = [builder.teacher(e) for e in read_examples(config.data.train, config.data)[:3]]
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(4, 20, (n,), generator=generator).tolist() for n in (3, 1, 7, 2, 5, 4)]
    return config, model, prompts, Responses.pack(words, 2, model.pad_id, model.device)


def cache_of(config, model, **changes):
    store = open_store(config.engine.model_copy(update=changes), model.device)
    return TeacherCache(store)


@torch.no_grad()
def test_a_hit_is_the_same_to_the_bit_and_computes_responses_only(setting):
    config, model, prompts, responses = setting
    cache = cache_of(config, model)
    first = cache.hidden(model, None, prompts, responses, [False] * 3)
    assert cache.metrics()["teacher_cache_misses"] == 3
    model.tokens.take()
    # another batch: one prompt known, one response of it
    part = responses.take([3], [0])
    again = cache.hidden(model, None, prompts[1:2], part, [False])
    assert model.tokens.take()["computed_tokens"] == responses.lengths[3] - 1
    fresh = cache_of(config, model).hidden(model, None, prompts[1:2], part, [False])
    assert torch.equal(again, fresh)
    assert torch.equal(cache.hidden(model, None, prompts, responses, [False] * 3), first)
    plain = response_hidden(model, prompts, responses, share_prefix=False)
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=1e-5)
    assert cache.metrics()["teacher_cache_hit_rate"] == pytest.approx(4 / 7)


@torch.no_grad()
@pytest.mark.parametrize("moving", [True, False], ids=["versioned", "a frozen version would be stale"])
def test_an_update_never_serves_what_older_weights_computed(setting, moving):
    config, model, prompts, responses = setting
    cache = cache_of(config, model)
    cache.hidden(model, 0 if moving else None, prompts, responses, [True] * 3)
    for parameter in model.module.parameters():
        parameter.mul_(1.1)
    found = cache.hidden(model, 1 if moving else None, prompts, responses, [True] * 3)
    want = response_hidden(model, prompts, responses, share_prefix=False)
    close = torch.allclose(found, want, rtol=1e-5, atol=1e-5)
    assert close == moving  # the other case is the mutant: the version left out


MOVING = {
    "live": ["teacher.kind=live"],
    "ema": [],
    "lora-live": ["model.adapter=lora", "teacher.kind=live"],
    "lora-dense": ["model.adapter=lora"],
    "lora-freeze_a": ["model.adapter=lora", "teacher.lora_average=freeze_a"],
    "lora-factors": ["model.adapter=lora", "teacher.lora_average=factors"],
}


@pytest.mark.parametrize("words", MOVING.values(), ids=MOVING.keys())
def test_every_teacher_that_moves_says_so(setting, tmp_path, words):
    _, _, prompts, responses = setting
    config = text_job(tmp_path, *words)
    model = load_model(config.model)
    teacher, cache = build_teacher(config.teacher, model), cache_of(config, model)

    def states(cache):
        return score(teacher, model, prompts, responses, cache=cache, again=[True] * 3)[0]

    before = states(cache)
    torch.testing.assert_close(states(cache), before, rtol=1e-5, atol=1e-5)
    assert cache.metrics()["teacher_cache_host_hits"] == 3
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        teacher.update()
        found, want = states(cache), states(None)
        assert (want - before).norm() > 1e-3 * before.norm()
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        before = want


@pytest.mark.parametrize("medium", ["pixel_values", "pixel_values_videos", "input_features"])
def test_other_media_under_the_same_tokens_are_another_prompt(tmp_path, monkeypatch, medium):
    family = FAMILIES["qwen2_5_omni"]
    build(family).save_pretrained(tmp_path / "omni")
    model = open_model(tmp_path / "omni", monkeypatch)
    cache = cache_of(text_job(tmp_path), model)
    view = next(prompt for prompt in prompts_of(family) if medium in prompt.inputs)
    other = replace(view, inputs={**view.inputs, medium: view.inputs[medium].flip(0, -1)})
    responses = responses_of(model, 1, 8)
    with torch.no_grad(), Double():
        first = cache.hidden(model, None, [view], responses, [False])
        found = cache.hidden(model, None, [other], responses, [False])
        want = response_hidden(model, [other], responses, share_prefix=False)
    assert (want - first).norm() > 1e-5 * first.norm()
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["ema", "live", "frozen"])
def test_runs_with_and_without_the_cache_learn_the_same(tmp_path, kind):
    """Six steps over seven rows: every row comes back, under the same weights only if the teacher is frozen."""
    from opsd.train import train

    results = []
    for cache in ("memory", "disk", "none"):
        words = [
            f"teacher.kind={kind}", "train.steps=6", "engine.token_budget=40", f"engine.teacher_cache={cache}",
            f"engine.teacher_cache_dir={tmp_path / 'cache'}", f"train.run_dir={tmp_path / cache}",
        ]  # fmt: skip
        run = train(text_job(tmp_path, *words))
        results.append(run.directory.read("metrics"))
    memory, disk, none = results
    assert ("teacher_cache_hit_rate" in memory[-1]) and "teacher_cache_hit_rate" not in none[-1]
    hits = memory[-1]["teacher_cache_host_hits"]
    assert hits > 0, "rows came back, or a prompt's responses were split"
    for ours, other, plain in zip(memory, disk, none, strict=True):
        assert ours["loss"] == other["loss"], "where a prefix was kept changes nothing"
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-6)  # other passes, other roundings


def test_a_second_run_of_a_frozen_teacher_finds_its_prompts_on_disk(tmp_path):
    from opsd.train import train

    words = ["teacher.kind=frozen", "engine.teacher_cache=disk", f"engine.teacher_cache_dir={tmp_path / 'cache'}"]
    first = train(text_job(tmp_path, *words, f"train.run_dir={tmp_path / 'a'}"))
    second = train(text_job(tmp_path, *words, f"train.run_dir={tmp_path / 'b'}"))
    assert first.teacher_cache.metrics()["teacher_cache_disk_hits"] == 0
    found = second.teacher_cache.metrics()
    assert found["teacher_cache_disk_hits"] > 0 and found["teacher_cache_misses"] == 0
    for ours, theirs in zip(first.directory.read("metrics"), second.directory.read("metrics"), strict=True):
        assert ours["loss"] == theirs["loss"]


def test_prompts_split_over_passes_are_computed_once_per_update(tmp_path):
    with open_run(text_job(tmp_path, "engine.token_budget=30", "teacher.kind=live")) as run:
        parts = micro_batches(run.config, sample(run, run.rows(0), 0))
        assert len(parts) > 4 and any(any(part.again) for part in parts)
        for part in parts:
            teach(run, part)
        counts = run.teacher_cache.metrics()
        different = len({view.text for part in parts for view in part.views})
        assert counts["teacher_cache_misses"] == different
        assert counts["teacher_cache_host_hits"] == sum(len(part.prompts) for part in parts) - different
        run.teacher.update()
        teach(run, parts[0])
        assert run.teacher_cache.metrics()["teacher_cache_misses"] == different + len(parts[0].prompts)
        assert run.teacher_cache.store.memory[0].kept.bytes < counts["teacher_cache_host_bytes"]


@torch.no_grad()
def test_a_moving_teachers_prompts_are_kept_only_for_who_asks_again(setting):
    config, model, prompts, responses = setting
    cache = cache_of(config, model)
    cache.hidden(model, 0, prompts, responses, [False, True, False])
    [(key, _)] = cache.store.memory[0].kept.items()
    assert key.length == prompts[1].length


@torch.no_grad()
@pytest.mark.parametrize("room", [0, 1], ids=["for none", "for one"])
def test_a_tight_budget_costs_hits_and_changes_no_bit(setting, room):
    config, model, prompts, responses = setting
    want = cache_of(config, model).hidden(model, None, prompts, responses, [False] * 3)
    cache = cache_of(config, model)
    largest = max(one.nbytes for one in prefill(model, prompts))
    cache.store.memory[0].kept.budget = room * largest
    for _ in range(3):
        assert torch.equal(cache.hidden(model, None, prompts, responses, [False] * 3), want)
        assert cache.store.memory[0].kept.bytes <= room * largest
    found = cache.metrics()
    assert found["teacher_cache_misses"] + found["teacher_cache_host_hits"] == 9
    assert (found["teacher_cache_host_evictions"] > 0) == (room > 0) and found["teacher_cache_misses"] > 3


@torch.no_grad()
def test_a_flipped_byte_and_a_killed_writer_are_counted_and_change_no_bit(setting, tmp_path):
    config, model, prompts, responses = setting
    folder = tmp_path / "cache"

    def ran():
        cache = cache_of(config, model, teacher_cache="disk", teacher_cache_dir=folder)
        hidden = cache.hidden(model, None, prompts, responses, [False] * 3)
        cache.store.flush()
        return hidden, {name.removeprefix("teacher_cache_disk_"): n for name, n in cache.metrics().items()}

    want, _ = ran()
    file = sorted(folder.glob("prefix-*"))[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (folder / ".writing").write_bytes(content[:99])  # what a kill leaves
    for damaged, abandoned, hits in ((1, 1, 2), (0, 0, 3)):
        found, counts = ran()
        assert torch.equal(found, want)
        assert (counts["damaged"], counts["abandoned"], counts["hits"]) == (damaged, abandoned, hits)


def test_the_version_says_whose_weights_only_where_files_outlive_them(setting, tmp_path):
    config, model, prompts, responses = setting
    with torch.no_grad():
        disk = cache_of(config, model, teacher_cache="disk", teacher_cache_dir=tmp_path / "c")
        disk.hidden(model, None, prompts, responses, [False] * 3)
        assert disk._current(model, None) == Version(model_identity(model.module, model.compute))
        memory = cache_of(config, model)
        assert memory._current(model, None) == Version("frozen")


def test_files_know_the_attention_kernel_and_the_torch_that_computed_them(setting, tmp_path, monkeypatch):
    """Their roundings differ: what one computed is not to the bit what the other would."""
    config, _, prompts, _ = setting

    def misses(engine) -> int:
        opened = load_model(config.model, engine=engine)
        cache = TeacherCache(open_store(engine, opened.device))
        answers = Responses.pack([[5, 6]], 1, opened.pad_id, opened.device)
        with torch.no_grad():
            cache.hidden(opened, None, prompts[:1], answers, [False])
        cache.store.flush()
        return cache.store.metrics()["misses"]

    files = config.engine.model_copy(update={"teacher_cache": "disk", "teacher_cache_dir": tmp_path / "c"})
    assert [misses(files), misses(files)] == [1, 0]
    assert misses(files.model_copy(update={"attention": "dense"})) == 1
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert misses(files) == 1
