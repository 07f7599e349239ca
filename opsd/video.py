"""A video's frames as patches for Qwen's vision towers: transformers' video processors to the bit, without torchvision.

Letters: F frames, C channels, t, h, w the grid of patches over time, height and width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

BICUBIC = 3  # of PIL.Image.Resampling
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What a checkpoint may say, and the only value that is handled; `None` beside it is the same.
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": BICUBIC,
    "cap_pixels_per_frame": False,
}


@dataclass(frozen=True)
class VideoProcessor:
    """Stands where `Qwen2VLVideoProcessor` or `Qwen3VLVideoProcessor` would be, for frames that are sampled already.

    whole_clip: `min_pixels` and `max_pixels` limit all frames together, as in Qwen3-VL, instead of each.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    whole_clip: bool

    model_input_names: ClassVar[list[str]] = ["pixel_values_videos", "video_grid_thw"]

    def __call__(
        self,
        videos: Sequence[np.ndarray],  # (F, height, width, C) uint8 each
        size: Mapping[str, int] | None = None,  # limits of the call instead of the checkpoint's
        video_metadata: Sequence[Any] | None = None,
        return_metadata: bool = False,
        frame_pixels: tuple[int | None, int | None] = (None, None),  # limits of each frame, before all others
        **_: Any,  # settings of sampling and decoding, which are over
    ) -> dict[str, Any]:
        """pixel_values_videos (patches of all, C * temporal * patch^2) fp32, video_grid_thw (videos, 3)."""
        low, high = (size["shortest_edge"], size["longest_edge"]) if size else (self.min_pixels, self.max_pixels)
        patches, grids = [], []
        for video in videos:
            frames = len(video) if self.whole_clip else 1
            limits = [given * frames if given else own for given, own in zip(frame_pixels, (low, high), strict=True)]
            flat, grid = self._patches(torch.from_numpy(video).permute(0, 3, 1, 2).contiguous(), *limits)
            patches.append(flat)
            grids.append(grid)
        metadata = {"video_metadata": video_metadata} if return_metadata else {}
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids), **metadata}

    def _patches(self, video: Tensor, low: int, high: int) -> tuple[Tensor, tuple[int, int, int]]:
        """video (F, C, height, width) uint8 -> patches in the order the tower merges them, and their grid (t, h, w)."""
        frames, _, height, width = video.shape
        shape = fitting(height, width, frames, self, low, high)
        if shape != (height, width):
            video = interpolate(video, shape, mode="bicubic", align_corners=False, antialias=True)
        mean, std = (torch.tensor(x) * (1.0 / self.rescale_factor) for x in (self.mean, self.std))
        values = video.float().sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        if missing := -len(values) % self.temporal_patch_size:  # the last frame stays on
            values = torch.cat([values, values[-1:].expand(missing, -1, -1, -1)])
        patch, merge = self.patch_size, self.merge_size
        t, h, w = len(values) // self.temporal_patch_size, shape[0] // patch, shape[1] // patch
        values = values.view(t, -1, values.shape[1], h // merge, merge, patch, w // merge, merge, patch)
        # (t, h', w', merge, merge, C, temporal, patch, patch)
        return values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def fitting(height: int, width: int, frames: int, to: VideoProcessor, low: int, high: int) -> tuple[int, int]:
    """The size a frame is brought to: multiples of a merged patch, near its shape, within the limits of pixels."""
    factor, beats = to.patch_size * to.merge_size, to.temporal_patch_size
    if to.whole_clip and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"expected a video with an aspect ratio of at most 200, got {width} x {height}")
    frames = max(frames, beats) if to.whole_clip else 1
    counted = round(frames / beats) * beats if to.whole_clip else 1
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if counted * rows * columns > high:
        beta = math.sqrt(frames * height * width / high)
        rows, columns = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif counted * rows * columns < low:
        beta = math.sqrt(low / (frames * height * width))
        rows, columns = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return rows, columns


def read_video_processor(files: Mapping[str, bytes], whole_clip: bool) -> VideoProcessor:
    """From a checkpoint's processor files by name: the nested settings, those of videos, or those of images.

    Raises ValueError for settings that are not handled.
    """
    nested = json.loads(files.get("processor_config.json", b"{}")).get("video_processor")
    names = ("video_preprocessor_config.json", "preprocessor_config.json")
    found = nested or next((json.loads(files[name]) for name in names if name in files), None)
    if found is None:
        raise ValueError(f"expected one of {', '.join(names)}, got none")
    for name, value in _FIXED.items():
        if found.get(name) not in (value, None):
            raise ValueError(f"expected {name} {value} in the settings of videos, got {found[name]!r}")
    factor = 32 if whole_clip else 28
    size = {"shortest_edge": 128 * factor**2, "longest_edge": 768 * factor**2, **(found.get("size") or {})}
    if not whole_clip:
        size["shortest_edge"] = found.get("min_pixels") or size["shortest_edge"]
        size["longest_edge"] = found.get("max_pixels") or size["longest_edge"]
    mean, std = _HALF if whole_clip else _CLIP
    return VideoProcessor(
        patch_size=found.get("patch_size", 16 if whole_clip else 14),
        merge_size=found.get("merge_size", 2),
        temporal_patch_size=found.get("temporal_patch_size", 2),
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
        mean=tuple(found.get("image_mean") or mean),
        std=tuple(found.get("image_std") or std),
        rescale_factor=found.get("rescale_factor", 1 / 255),
        whole_clip=whole_clip,
    )
