"""Prompts computed before, beside new ones, and where responses go on: every family with its media, fp64."""

from __future__ import annotations

import pytest
import torch

from opsd import plain
from opsd.engine import forward, prefill, response_hidden
from tests.families import FAMILIES, Builder, Double, build
from tests.test_families import open_model, relative, responses_of
from tests.test_features import views


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=lambda family: family.name)
def setting(request, tmp_path_factory):
    """The family, and its model with an adapter, so that its towers' features are kept."""
    folder = tmp_path_factory.mktemp(request.param.name)
    build(request.param).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        model = open_model(folder, patch, "model.adapter=lora")
    assert len(model.towers.owners) == len(request.param.media)
    return request.param, model


@torch.no_grad()
def test_known_prompts_beside_new_ones_change_nothing(setting):
    family, model = setting
    prompts = views(family)
    responses = responses_of(model, len(prompts), 8)
    with Double():
        want = response_hidden(model, prompts, responses, share_prefix=False)
        stored = [prefill(model, [prompt])[0] for prompt in prompts]
        for known in ((0,), (len(prompts) - 1,), range(len(prompts))):
            model.towers.cache.__init__(1)  # the new ones' media are computed in this pass
            given = [one if i in known else None for i, one in enumerate(stored)]
            found, kept = forward(model, prompts, responses, given, keep=True)
            assert relative(found, want) < 1e-9
            new = [one for i, one in enumerate(stored) if i not in known]
            for mine, alone in zip(kept, new, strict=True):
                assert mine.next_position == alone.next_position
                for a, b in zip(mine.tensors(), alone.tensors(), strict=True):
                    assert relative(a, b) < 1e-9


@torch.no_grad()
def test_a_response_goes_on_behind_the_widest_axis_of_an_image_that_ends_its_prompt(setting):
    """Text behind a medium stands at one position on all axes, and would hide which of them was read."""
    family, model = setting
    if not family.name.endswith("_vl"):
        pytest.skip("one axis; or Omni, which counts no image without the token behind it")
    cut = Builder(family, 7).text(2).image(4, 8)
    cut.ids.pop(), cut.kinds.pop()
    prompt, responses = cut.prompt(), responses_of(model, 1, 8)
    with Double():
        own = model.positions(prompt)
        assert len({axis.max().item() for axis in own}) > 1
        (stored,) = prefill(model, [prompt])
        assert stored.next_position == own.max() + 1 == plain.prefill(model, [prompt]).next_position
        packed, known = response_hidden(model, [prompt], responses), forward(model, [prompt], responses, [stored])[0]
        want = response_hidden(model, [prompt], responses, share_prefix=False)
    assert relative(packed, want) < 1e-9 and relative(known, want) < 1e-9
