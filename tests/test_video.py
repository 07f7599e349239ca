"""Frames as patches: transformers' own video processors, to the bit, where torchvision is installed; and by hand."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsd.processing import load_processor
from opsd.prompts import PromptBuilder
from opsd.sections import MediaConfig, PromptsConfig
from opsd.video import VideoProcessor, read_video_processor
from tests.processors import WITH_VIDEO, write_processor
from tests.videos import pictures, write_video

MODULES = {"Qwen2VLVideoProcessor": "qwen2_vl", "Qwen3VLVideoProcessor": "qwen3_vl"}
SETTINGS: dict[str, dict[str, Any]] = {
    "as the class has it": {},
    "small": {"patch_size": 4, "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}},
    "own colours": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1], "rescale_factor": 1 / 128},
    "by pixels": {"min_pixels": 56 * 56, "max_pixels": 112 * 84, "size": {"shortest_edge": 1, "longest_edge": 2}},
    "one at a time": {"temporal_patch_size": 1, "merge_size": 1},
}
SHAPES = [(4, 48, 64), (7, 104, 40), (3, 32, 40), (16, 240, 320), (5, 8, 304)]  # frames, height, width


@pytest.fixture(scope="module")
def torchvision() -> Any:
    """A CUDA torchvision beside a CPU torch lacks two operators that its import looks for: they are declared."""
    try:
        return importlib.import_module("torchvision.transforms.v2")
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision.transforms.v2"), library


def ours(kind: str, settings: dict[str, Any]) -> VideoProcessor:
    file = json.dumps(settings).encode()
    return read_video_processor({"video_preprocessor_config.json": file}, kind == "Qwen3VLVideoProcessor")


def theirs(kind: str, settings: dict[str, Any]) -> Any:
    module = importlib.import_module(f"transformers.models.{MODULES[kind]}.video_processing_{MODULES[kind]}")
    fixed = {"cap_pixels_per_frame": False, "do_sample_frames": False}
    return getattr(module, kind)(**copy.deepcopy(settings), **fixed)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", MODULES)
def test_patches_are_those_of_transformers_to_the_bit(torchvision: Any, kind: str, settings: str) -> None:
    if kind == "Qwen3VLVideoProcessor" and settings == "by pixels":
        pytest.skip("Qwen3-VL's knows the size of all frames only")
    mine, reference = ours(kind, SETTINGS[settings]), theirs(kind, SETTINGS[settings])
    for shape in SHAPES:
        frames = pictures(*shape)
        size = {"size": {"shortest_edge": 1000, "longest_edge": 9000}}
        for call in ({}, size):
            got = mine([frames, frames[:2]], **call)  # type: ignore[arg-type]
            want = reference([frames, frames[:2]], **call)
            assert torch.equal(got["video_grid_thw"], want["video_grid_thw"]), shape
            assert torch.equal(got["pixel_values_videos"], want["pixel_values_videos"]), shape


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_the_whole_processor_gives_what_transformers_own_gives(torchvision: Any, name: str, tmp_path: Path) -> None:
    import transformers
    from transformers.video_utils import VideoMetadata

    mine = load_processor(write_processor(tmp_path, name))
    own = getattr(transformers, type(mine).__name__).from_pretrained(tmp_path)
    assert type(own.video_processor).__name__ in MODULES
    clip = pictures(6, 40, 32)
    marks = f"{mine.tokenizer.convert_ids_to_tokens(53)}{mine.video_token}{mine.tokenizer.convert_ids_to_tokens(54)}"
    metadata = [VideoMetadata(total_num_frames=24, fps=8.0, frames_indices=[1, 5, 9, 13, 17, 21]) for _ in range(2)]
    answers = []
    for processor in (mine, own):
        out = processor(
            text=[f"see {marks} well"], videos=[clip], return_tensors="pt", add_special_tokens=False,
            videos_kwargs={"video_metadata": [copy.deepcopy(metadata[0])], "do_sample_frames": False},
        )  # fmt: skip
        answers.append(out)
    assert answers[0].keys() == answers[1].keys()
    for key, value in answers[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(answers[1][key])), key


def test_a_patch_by_hand() -> None:
    """(t, h', w', merge, merge) patches of (C, temporal, patch, patch) values, (x / 255 - mean) / std."""
    processor = ours("Qwen2VLVideoProcessor", {**SETTINGS["small"], "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    frames = pictures(3, 16, 24)
    out = processor([frames])
    assert out["video_grid_thw"].tolist() == [[2, 4, 6]] and out["pixel_values_videos"].shape == (48, 96)
    patches = out["pixel_values_videos"].view(2, 2, 3, 2, 2, 3, 2, 4, 4).numpy()
    values = (frames.astype(np.float64) / 255 - 0.5) / 0.25
    t, h, w, y, x = 1, 1, 2, 0, 1  # the second pair of frames has the last one twice
    rows, columns = slice((2 * h + y) * 4, (2 * h + y) * 4 + 4), slice((2 * w + x) * 4, (2 * w + x) * 4 + 4)
    for place in (0, 1):
        want = values[2, rows, columns].transpose(2, 0, 1)
        np.testing.assert_allclose(patches[t, h, w, y, x][:, place], want, atol=1e-5)


def test_limits_of_a_frame_go_before_all_others() -> None:
    frames = pictures(4, 64, 64)
    for kind in MODULES:
        processor = ours(kind, SETTINGS["small"])
        for limits, side in (((None, None), 32), ((None, 16 * 16), 16), ((64 * 64, 64 * 64), 64)):
            frames_together = 4 if kind == "Qwen3VLVideoProcessor" and limits == (None, None) else 1
            grid = processor([frames], frame_pixels=limits)["video_grid_thw"]
            assert grid.tolist() == [[2, *[int(side / frames_together**0.5) // 4] * 2]], (kind, limits)


@pytest.mark.parametrize(
    "settings", [{"do_resize": False}, {"resample": 2}, {"cap_pixels_per_frame": True}, {"do_normalize": False}]
)
def test_settings_that_are_not_handled_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"expected {next(iter(settings))} .* in the settings of videos, got"):
        ours("Qwen2VLVideoProcessor", settings)


def test_settings_come_from_the_nested_file_then_from_that_of_videos_then_from_that_of_images() -> None:
    files = {
        "processor_config.json": json.dumps({"video_processor": {"patch_size": 4}}).encode(),
        "video_preprocessor_config.json": b'{"patch_size": 5}',
        "preprocessor_config.json": b'{"patch_size": 6}',
    }
    for expected in (4, 5, 6):
        assert read_video_processor(files, whole_clip=False).patch_size == expected
        files.pop(next(iter(files)))
    with pytest.raises(ValueError, match=r"expected one of video_preprocessor_config\.json.*got none"):
        read_video_processor({}, whole_clip=False)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_every_family_is_told_the_real_times(name: str, tmp_path: Path) -> None:
    """Two videos of different rates in one prompt, one with frames at uneven times."""
    from tests.test_prompts import example

    processor = load_processor(write_processor(tmp_path / "model", name))
    even = write_video(tmp_path / "even.avi", pictures(20), rate=5)
    uneven = write_video(tmp_path / "uneven.mkv", pictures(4, 32, 32), rate=10, times=[0, 2, 20, 39])
    builder = PromptBuilder(processor, PromptsConfig(), MediaConfig(frames=4))
    inputs = builder.student(example({"type": "video", "video": even}, {"type": "video", "video": uneven})).inputs
    assert inputs["video_grid_thw"][:, 0].tolist() == [2, 1]
    placed = int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(processor.video_token)).sum())
    assert placed == int(inputs["video_grid_thw"].prod(-1).sum()) // 4
    # frames at 0.4, 1.4, 2.4, 3.4 of 4 s; and at what is on the screen at 0.5, 1.5, 2.5, 3.5 of 4 s: 0.2, 2.0
    if name == "qwen3_vl":
        text = processor.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
        assert [text.count(f"{t}seconds") for t in ("0.9", "2.9", "1.1")] == [1, 1, 1], text
        return
    key = "second_per_grid_ts" if name == "qwen2_5_vl" else "video_second_per_grid"
    torch.testing.assert_close(inputs[key], torch.tensor([2.0, 3.6]), rtol=1e-5, atol=1e-5)
