"""Identities: equal for the same content, different for any other."""

from __future__ import annotations

import pytest
import torch

from opsd.digests import media_digest, media_digests, model_identity, tensor_bytes
from opsd.prefix_entry import PrefixKey, Version
from tests.models import save_text_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
def test_bytes_of_a_tensor_whatever_its_layout(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert bytes(tensor_bytes(tensor.T.contiguous().T)) == bytes(tensor_bytes(tensor))
    assert len(tensor_bytes(tensor)) == tensor.nbytes
    assert bytes(tensor_bytes(tensor[:0])) == b""


def test_media_differ_in_bytes_shape_dtype_and_order() -> None:
    pixels, grid = torch.zeros(2, 4), torch.tensor([[1, 2, 2]])
    media = [
        (pixels, grid),
        (grid, pixels),
        (pixels,),
        (pixels.reshape(4, 2), grid),
        (pixels.view(torch.int32), grid),
        (pixels.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(-0.0)), grid),
    ]
    assert len({media_digest(*tensors) for tensors in media}) == len(media)
    assert media_digest(pixels.clone(), grid) == media_digest(pixels, grid)


def test_media_of_a_prompt_by_name() -> None:
    inputs = {"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(2), "image_grid_thw": torch.ones(3)}
    found = media_digests(inputs, besides=("input_ids",))
    assert [digest.split(":")[0] for digest in found] == ["image_grid_thw", "pixel_values"]
    assert found == media_digests(dict(reversed(inputs.items())), besides=("input_ids",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("model"))


def load(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


def test_a_model_is_its_content_wherever_it_was_loaded_from(folder, tmp_path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path)
    assert model_identity(model) == model_identity(load(tmp_path))


def test_any_weight_the_config_and_the_compute_type_are_part_of_a_model(folder) -> None:
    base = model_identity(load(folder))
    seen = {base, model_identity(load(folder), compute="bfloat16"), model_identity(load(folder).bfloat16())}
    changed = load(folder)
    changed.config.rms_norm_eps *= 2
    seen.add(model_identity(changed))
    model = load(folder)
    weights = [parameter.data.view(-1) for parameter in model.parameters()]
    for weight in weights:
        before = weight[-1].clone()
        weight[-1] = torch.nextafter(before, before + 1)
        seen.add(model_identity(model))
        weight[-1] = before
    assert len(seen) == 4 + len(weights)
    assert model_identity(model) == base


def test_an_adapter_leaves_the_identity_of_the_model_under_it(folder) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(folder), LoraConfig(r=2, target_modules="all-linear"))
    assert model_identity(adapted) == model_identity(load(folder))


def test_everything_in_a_key_makes_another_digest() -> None:
    tokens, frozen = torch.tensor([1, 2, 3]), Version("a")
    keys = [
        PrefixKey.of(frozen, tokens),
        PrefixKey.of(Version("b"), tokens),
        PrefixKey.of(Version("a", 0), tokens),
        PrefixKey.of(Version("a", 1), tokens),
        PrefixKey.of(frozen, torch.tensor([1, 2, 4])),
        PrefixKey.of(frozen, tokens[:2]),
        PrefixKey.of(frozen, tokens, ["m"]),
        PrefixKey.of(frozen, tokens, ["m", "n"]),
        PrefixKey.of(frozen, tokens, ["n", "m"]),
        PrefixKey.of(frozen, tokens, ["mn"]),
    ]
    assert len({key.digest for key in keys}) == len(set(keys)) == len(keys)
    assert PrefixKey.of(frozen, tokens[None]) == keys[0] and keys[0].length == 3
    with pytest.raises(ValueError, match=r"expected token ids of int64, got torch\.int32"):
        PrefixKey.of(frozen, tokens.int())
