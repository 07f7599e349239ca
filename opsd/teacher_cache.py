"""The teacher's prompts, computed once per weights: looked up before a pass, kept after it."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from opsd.digests import media_digests, model_identity
from opsd.engine import forward, prefill
from opsd.model import LanguageModel
from opsd.prefix_entry import PrefixKey, Version
from opsd.prefix_store import PrefixStore
from opsd.prompts import PER_TOKEN, Prompt
from opsd.responses import Responses


class TeacherCache:
    """A PrefixStore under the versions of one teacher, which say how prefixes are kept too: codes are never exact ones.

    A frozen teacher's prompts are found again in every epoch, and with files in every later run. Each is computed in a
    pass of its own, so that what is kept, and what a pass computes from it, is the same to the bit whether it was found
    or not. A teacher that moves has a new version after each update, under which nothing is found; its prompts are
    computed with their responses, and kept only where the same step asks for them again.
    """

    def __init__(self, store: PrefixStore):
        self.store = store
        self._version: Version | None = None
        self._frozen: Version | None = None
        self._media: WeakKeyDictionary[Prompt, tuple[str, ...]] = WeakKeyDictionary()

    def hidden(
        self,
        model: LanguageModel,
        updates: int | None,
        prompts: Sequence[Prompt],
        responses: Responses,
        again: Sequence[bool],
    ) -> Tensor:  # (N, D)
        """States that predict the responses, as of `opsd.engine.response_hidden`, with the weights the model wears.

        updates: how often those have moved, None for a frozen teacher. again: prompts another pass of this step needs.
        """
        version = self._current(model, updates)
        keys = [PrefixKey.of(version, prompt.inputs["input_ids"], self._digests(prompt)) for prompt in prompts]
        known = [self.store.get(key) for key in keys]
        if version.lasting:
            for i, one in enumerate(known):
                if one is None:
                    (computed,) = prefill(model, prompts[i : i + 1])
                    known[i] = self.store.put(keys[i], computed)
        fresh = [i for i, one in enumerate(known) if one is None]
        hidden, kept = forward(model, prompts, responses, known, keep=any(again[i] for i in fresh))
        for i, stored in zip(fresh, kept, strict=False):  # nothing was kept where nobody asks again
            if again[i]:
                self.store.put(keys[i], stored)
        return hidden

    def metrics(self) -> dict[str, float]:
        """Sums since the start of the process, by name; the share of lookups that found their prompt."""
        counts = self.store.metrics()
        hits = sum(value for name, value in counts.items() if name.endswith("_hits"))
        asked = hits + counts["misses"]
        record = {f"teacher_cache_{name}": float(value) for name, value in counts.items()}
        record |= {f"teacher_cache_{name}": value for name, value in self.store.errors().items()}
        return record | {"teacher_cache_hit_rate": hits / asked if asked else 0.0}

    def _current(self, model: LanguageModel, updates: int | None) -> Version:
        version = self._frozen if updates is None else Version("moving", updates)
        if version is None:  # only files outlive the process, so only they need to know whose weights these are
            name = model_identity(model.module, model.compute) if self.store.files is not None else "frozen"
            kept = "" if self.store.dtype == "exact" else f", kept as {self.store.dtype}"
            version = self._frozen = Version(name + kept)
        if version != self._version:
            self.store.drop_other_versions(version)
            self._version = version
        return version

    def _digests(self, prompt: Prompt) -> tuple[str, ...]:
        found = self._media.get(prompt)
        if found is None:
            found = self._media[prompt] = media_digests(prompt.inputs, PER_TOKEN)
        return found
