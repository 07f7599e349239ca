"""Frozen vision and audio towers are run once per medium: rollout, student and teacher share what they gave.

A tower none of whose parameters is trained is a function of its medium, so its features are kept by the medium's
digest, up to `engine.feature_cache_mib`; 0 is the plain twin, which runs the tower in every pass. A trained tower is
never asked less often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from opsd.digests import media_digest
from opsd.feature_cache import FeatureCache
from opsd.prompts import Prompt


@dataclass(frozen=True)
class Kind:
    """One kind of medium: its inputs, the tower that reads them, and the method of the model that asks the tower."""

    content: str
    shape: str  # grid of patches, or mask of frames
    tower: str
    method: str


KINDS = (
    Kind("pixel_values", "image_grid_thw", "visual", "get_image_features"),
    Kind("pixel_values_videos", "video_grid_thw", "visual", "get_video_features"),
    Kind("input_features", "feature_attention_mask", "audio_tower", "get_audio_features"),
)
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")


@dataclass(frozen=True)
class Features:
    """What the model reads of its tower's output."""

    pooler_output: list[Tensor]  # images and videos: (tokens, D) each
    deepstack_features: list[Tensor]  # per deepstack layer: (tokens of all, D)
    last_hidden_state: Tensor  # sounds: (tokens of all, D)


class Towers:
    """The towers of a model, asked for each medium only while its features are not in the cache."""

    def __init__(self, base: Any, budget_mib: int):
        self.cache = FeatureCache(budget_mib)
        self.saved_tokens = 0  # tokens of media whose features were found
        self._asking = False
        self._digests: WeakKeyDictionary[Prompt, dict[Kind, list[str]]] = WeakKeyDictionary()
        self.owners: dict[Kind, Any] = {}
        for kind in KINDS if budget_mib else ():
            owner = next((m for m in base.modules() if kind.tower in dict(m.named_children())), None)
            if owner is not None and _is_function(getattr(owner, kind.tower)):
                self.owners[kind] = owner

    @contextmanager
    def serving(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Inside, a forward over the media of these prompts, in their order, finds features instead of computing."""
        with ExitStack() as stack:
            for kind, owner in self.owners.items():
                if any(kind.content in prompt.inputs for prompt in prompts):
                    stack.enter_context(self._served(kind, owner, prompts))
            yield

    def metrics(self) -> dict[str, int]:
        """Sums since the start; bytes now."""
        return {**self.cache.metrics(), "saved_tokens": self.saved_tokens}

    @contextmanager
    def _served(self, kind: Kind, owner: Any, prompts: Sequence[Prompt]) -> Iterator[None]:
        ask = getattr(owner, kind.method)

        def answer(content: Tensor, shape: Tensor, *rest: Any, **options: Any) -> Any:
            if self._asking:  # Qwen3-VL asks for videos by its method for images
                return ask(content, shape, *rest, **options)
            digests = [digest for prompt in prompts for digest in self._digests_of(prompt, kind)]
            assert len(digests) == len(shape), "the media of the pass are those of its prompts"
            looked_up = {digest: self.cache.get(digest) for digest in dict.fromkeys(digests)}
            known = {digest: found for digest, found in looked_up.items() if found is not None}
            self.saved_tokens += sum(len(known[digest][0]) for digest in digests if digest in known)
            missing = [i for i, digest in enumerate(digests) if digest not in known and digest not in digests[:i]]
            for i, features in zip(missing, self._compute(kind, ask, content, shape, missing, options), strict=True):
                known[digests[i]] = features
                self.cache.put(digests[i], *features)
            main, *deep = zip(*(known[digest] for digest in digests), strict=True)
            return Features(list(main), [torch.cat(layer) for layer in deep], torch.cat(main))

        setattr(owner, kind.method, answer)
        try:
            yield
        finally:
            delattr(owner, kind.method)

    def _compute(self, kind: Kind, *call: Any) -> list[tuple[Tensor, ...]]:
        self._asking = True
        try:
            with torch.no_grad():
                return (_sounds if kind.tower == "audio_tower" else _pictures)(*call)
        finally:
            self._asking = False

    def _digests_of(self, prompt: Prompt, kind: Kind) -> list[str]:
        """One digest per medium of this kind, made on the host once per prompt."""
        of_kinds = self._digests.setdefault(prompt, {})
        if kind not in of_kinds:
            known = kind.content in prompt.inputs
            of_kinds[kind] = _digests(kind, prompt.inputs[kind.content], prompt.inputs[kind.shape]) if known else []
        return of_kinds[kind]


def _digests(kind: Kind, content: Tensor, shape: Tensor) -> list[str]:
    if kind.tower == "audio_tower":  # the frames that only pad a sound to another's length are not its own
        return [media_digest(x[:, : int(mask.sum())]) for x, mask in zip(content, shape, strict=True)]
    parts = content.split(shape.prod(-1).tolist())
    return [media_digest(part, grid) for part, grid in zip(parts, shape, strict=True)]


def _is_function(tower: Any) -> bool:
    """Whether the tower gives the same for the same medium for as long as the model lives."""
    drops = any(getattr(tower.config, name, 0.0) for name in _DROPOUTS)
    return not drops and not any(p.requires_grad for p in tower.parameters())


def _pictures(
    ask: Any, patches: Tensor, grid: Tensor, missing: list[int], options: dict[str, Any]
) -> list[tuple[Tensor, ...]]:
    """Features of some images or videos, from one call: its attention stays within each of them."""
    if not missing:
        return []
    parts = patches.split(grid.prod(-1).tolist())
    index = torch.tensor(missing, device=grid.device)
    found = ask(torch.cat([parts[i] for i in missing]), grid.index_select(0, index), **options)
    main = list(found.pooler_output)
    sizes = [len(one) for one in main]
    deep = [layer.split(sizes) for layer in getattr(found, "deepstack_features", None) or []]
    return list(zip(main, *deep, strict=True))


def _sounds(
    ask: Any, frames: Tensor, mask: Tensor, missing: list[int], options: dict[str, Any]
) -> list[tuple[Tensor, ...]]:
    """Features of some sounds, a call each: Qwen3-Omni's convolutions see how far a batch is padded."""
    lengths = mask.sum(-1).tolist()
    return [
        (ask(frames[i : i + 1, :, : lengths[i]], mask[i : i + 1, : lengths[i]], **options).last_hidden_state,)
        for i in missing
    ]
