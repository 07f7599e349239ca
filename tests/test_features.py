"""Features of frozen towers by medium: equal with and without the cache, computed once, never for a trained tower."""

from __future__ import annotations

import pytest
import torch

from opsd.engine import prefill, response_hidden
from opsd.prompts import Prompt
from tests.families import AUDIO, FAMILIES, IMAGE, Builder, Double, build, prompts
from tests.test_families import open_model, relative, responses_of

TOWERS = {
    "qwen2_5_vl": ("model.visual",),
    "qwen3_vl": ("model.visual",),
    "qwen2_5_omni": ("visual", "audio_tower"),
    "qwen3_omni_moe": ("visual", "audio_tower"),
}


def views(family):
    """Qwen3-Omni's sounds depend on how far their batch is padded: one sound a pass there."""
    return [v for i, v in enumerate(prompts(family)) if family.name != "qwen3_omni_moe" or i != 1]


class Asked:
    """How often each tower ran."""

    def __init__(self, model):
        base = model.module.get_base_model() if model.has_adapter else model.module
        self.counts = {}
        for name, module in base.named_modules():
            if name.rpartition(".")[2] in ("visual", "audio_tower"):
                self.counts[name] = 0
                module.register_forward_hook(lambda *_, name=name: self.count(name))

    def count(self, name):
        self.counts[name] += 1

    def take(self):
        found, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return found


@pytest.fixture(scope="module", params=TOWERS)
def setting(request, tmp_path_factory):
    """The family, and a function that opens its model with the given config."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    build(family).save_pretrained(folder)

    def open_with(*words, frozen=TOWERS[request.param]):
        with pytest.MonkeyPatch.context() as patch:
            return open_model(folder, patch, *words, f"model.freeze=[{', '.join(frozen)}]")

    return family, open_with


def passes(model, family, what=None):
    """States and gradients of one pass."""
    what = what or views(family)
    model.module.zero_grad()
    with Double():
        hidden = response_hidden(model, what, responses_of(model, len(what), 1))
        hidden.sin().sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}


def test_features_from_the_cache_change_nothing_and_towers_run_once(setting):
    family, open_with = setting
    plain, cached = open_with("engine.feature_cache_mib=0"), open_with()
    assert not plain.towers.owners and len(cached.towers.owners) == len(family.media)
    asked = Asked(cached)
    expected, grads = passes(plain, family)
    first = passes(cached, family)
    assert all(asked.take().values())
    again = passes(cached, family)
    assert not any(asked.take().values()), "a medium was computed twice"
    assert relative(first[0], expected) < 1e-9
    assert grads.keys() == first[1].keys() == again[1].keys()
    for name, grad in grads.items():
        assert (first[1][name] - grad).norm() < 1e-9 * grad.norm() + 1e-12, name
    assert torch.equal(first[0], again[0]), "a hit is the same to the bit"
    shapes = ("image_grid_thw", "video_grid_thw", "feature_attention_mask")
    media = sum(len(v.inputs[name]) for v in views(family) for name in shapes if name in v.inputs)
    found = cached.towers.metrics()
    placeholders = sum(
        ((v.inputs["input_ids"] >= IMAGE) & (v.inputs["input_ids"] <= AUDIO)).sum() for v in views(family)
    )
    assert (found["hits"], found["misses"], found["saved_tokens"]) == (media, media, int(placeholders))


def test_another_view_and_another_neighbour_find_the_same_media(setting):
    """The teacher's prompt has more text around the same pixels; its batch has other rows."""
    family, open_with = setting
    model = open_with()
    asked = Asked(model)
    passes(model, family)
    asked.take()
    other = prompts(family, rationale=3)
    with torch.no_grad(), Double():
        got = [prefill(model, [other[i]])[0].last_hidden for i in (2, 0)]
        assert not any(asked.take().values())
        model.towers.owners.clear()
        expected = [prefill(model, [other[i]])[0].last_hidden for i in (2, 0)]
    assert all(relative(a, b) < 1e-9 for a, b in zip(got, expected, strict=True))


def test_other_content_is_another_medium(setting):
    family, open_with = setting
    model = open_with()
    (view, *_) = views(family)
    with torch.no_grad(), Double():
        base = prefill(model, [view])[0].last_hidden
        for name in {"pixel_values", "input_features"} & view.inputs.keys():
            changed = Prompt({**view.inputs, name: view.inputs[name].flip(0, -1)}, "")
            assert relative(prefill(model, [changed])[0].last_hidden, base) > 1e-4, name


def test_the_same_patches_in_another_grid_are_another_medium(setting):
    family, open_with = setting
    model, plain = open_with(), open_with("engine.feature_cache_mib=0")
    wide = Builder(family, 90).text(2).image(4, 8).text(1).prompt()
    high = Prompt({**wide.inputs, "image_grid_thw": torch.tensor([[1, 8, 4]])}, "")
    with torch.no_grad(), Double():
        first = prefill(model, [wide])[0].last_hidden
        found, want = (prefill(one, [high])[0].last_hidden for one in (model, plain))
    assert relative(want, first) > 1e-4 and relative(found, want) < 1e-9


def test_a_sound_is_found_whatever_it_was_padded_to(setting):
    family, open_with = setting
    if "audio" not in family.media:
        pytest.skip("no sounds")
    model = open_with()
    alone = Builder(family, 91).sound(120).text(1).prompt()
    beside = Builder(family, 91).sound(120).sound(200).text(1).prompt()
    passes(model, family, [alone])
    passes(model, family, [beside])
    assert (model.towers.metrics()["hits"], model.towers.metrics()["misses"]) == (1, 2)


def test_what_is_kept_of_a_sound_does_not_depend_on_its_neighbours(setting):
    """Qwen3-Omni's convolutions would see how far the sound is padded."""
    family, open_with = setting
    if "audio" not in family.media:
        pytest.skip("no sounds")
    alone = Builder(family, 91).sound(20).text(1).prompt()
    beside = Builder(family, 91).sound(20).sound(120).text(1).prompt()
    found = []
    for order in ((alone, beside), (beside, alone)):
        model = open_with()
        with torch.no_grad(), Double():
            states = {id(prompt): prefill(model, [prompt])[0].last_hidden for prompt in order}
        found.append((states[id(alone)], states[id(beside)]))
    assert all(relative(a, b) < 1e-9 for a, b in zip(*found, strict=True))


def test_a_sound_that_comes_twice_in_a_pass_is_computed_once(setting):
    family, open_with = setting
    if "audio" not in family.media:
        pytest.skip("no sounds, which are computed one by one")
    model = open_with()
    asked = Asked(model)
    alone = Builder(family, 91).sound(120).text(1).prompt()
    beside = Builder(family, 91).sound(120).sound(200).text(1).prompt()
    passes(model, family, [alone, beside])
    assert sum(n for name, n in asked.take().items() if name.endswith("audio_tower")) == 2


def test_a_mixture_of_known_and_new_media_keeps_their_order(setting):
    family, open_with = setting
    model, plain = open_with(), open_with("engine.feature_cache_mib=0")
    what = views(family)
    one, two = Builder(family, 90).text(2).image(4, 6).text(1).image().text(1).prompt(), what[-1]
    passes(model, family, [two])
    for batch in ([one, two, one], [two, one]):
        assert relative(passes(model, family, batch)[0], passes(plain, family, batch)[0]) < 1e-9


def test_a_trained_tower_is_never_cached(setting):
    family, open_with = setting
    kept = TOWERS[family.name][1:]  # the audio tower where there is one
    model = open_with(frozen=kept)
    assert {kind.tower for kind in model.towers.owners} == set(kept)
    asked = Asked(model)
    for _ in range(2):
        _, grads = passes(model, family)
        assert any(".visual." in f".{name}" and grad.norm() > 0 for name, grad in grads.items())
        assert all(n for name, n in asked.take().items() if name.endswith("visual"))


def test_under_an_adapter_the_towers_are_frozen(setting):
    family, open_with = setting
    model = open_with("model.adapter=lora", frozen=())
    assert len(model.towers.owners) == len(family.media)
    asked = Asked(model)
    first = passes(model, family)
    assert all(asked.take().values())
    assert torch.equal(passes(model, family)[0], first[0]) and not any(asked.take().values())


def test_a_tower_with_dropout_is_no_function(setting):
    family, open_with = setting
    if "audio" not in family.media:
        pytest.skip("only audio towers have dropout")
    model = open_with()
    base = model.module
    base.audio_tower.config.dropout = 0.1
    assert {kind.tower for kind in type(model.towers)(base, 1).owners} == {"visual"}


def test_a_tight_budget_evicts_and_changes_nothing(setting):
    family, open_with = setting
    model = open_with()
    expected, _ = passes(model, family)
    model.towers.cache._kept.budget = 1100  # about one image
    for _ in range(2):
        assert relative(passes(model, family)[0], expected) < 1e-9
    model.module.get_decoder().forward = None  # a pass that fails leaves the model as it was
    with pytest.raises(TypeError):
        passes(model, family)
    assert all(kind.method not in vars(owner) for kind, owner in model.towers.owners.items())
