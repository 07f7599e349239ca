"""Prompts that are kept, built ahead on other threads, and left out where a file is damaged."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from opsd.config import MediaConfig, PromptsConfig
from opsd.data import Example
from opsd.errors import InputError, MediumError
from opsd.prompt_cache import VIEWS, PromptCache, verify
from opsd.prompts import Prompt, PromptBuilder
from tests.test_prompts import Tokenizer, example


class Builder(PromptBuilder):
    """Remembers which thread built what; the rows of `damaged` have files that do not decode."""

    def __init__(self, damaged: tuple[int, ...] = ()) -> None:
        super().__init__(Tokenizer(), PromptsConfig(), MediaConfig())
        self.damaged, self.built, self.looked = damaged, list[tuple[str, int, bool]](), list[int]()

    def decode_media(self, row: Example) -> None:
        self.looked.append(row.line)
        self._open(row)

    def _open(self, row: Example) -> None:
        if row.line in self.damaged:
            raise MediumError("a video", "none", file=row.file, line=row.line, field="prompt")

    def _note(self, view: str, row: Example) -> None:
        self._open(row)
        self.built.append((view, row.line, threading.current_thread() is threading.main_thread()))

    def student(self, row: Example) -> Prompt:
        self._note("student", row)
        return super().student(row)

    def teacher(self, row: Example) -> Prompt:
        self._note("teacher", row)
        return super().teacher(row)


def rows(count: int) -> list[Example]:
    return [replace(example(subtitle=f"number {i}"), line=i) for i in range(count)]


@pytest.fixture
def opened() -> Any:
    caches = []

    def open_cache(builder: Builder, mib: int = 1, workers: int = 2) -> PromptCache:
        caches.append(PromptCache(builder, mib, workers))
        return caches[-1]

    yield open_cache
    for cache in caches:
        cache.close()


def texts(cache: PromptCache, some: list[Example]) -> list[str]:
    return [getattr(cache, view)(row).text for row in some for view in VIEWS]


def test_what_was_prepared_is_the_same_and_built_once_elsewhere(opened: Any) -> None:
    plain, ahead = Builder(), Builder()
    some = rows(6)
    want = texts(opened(plain, workers=0), some)
    cache = opened(ahead)
    cache.prepare(some, VIEWS)
    cache.prepare(some, VIEWS)  # what comes is not started again
    assert texts(cache, some) == want
    assert sorted(ahead.built) == sorted((view, i, False) for i in range(6) for view in VIEWS)
    assert all(here for _, _, here in plain.built)
    cache.prepare(some, VIEWS)  # what is kept is not built either
    assert len(ahead.built) == 12 and not cache._ahead


def test_rows_of_two_files_are_two_rows(opened: Any) -> None:
    cache, (row, *_) = opened(Builder(damaged=(2,))), rows(1)
    other = replace(example(subtitle="another"), file=row.file.with_name("test.jsonl"), line=row.line)
    assert texts(cache, [row]) != texts(cache, [other]) == texts(opened(Builder()), [other])


def test_memory_ahead_is_that_of_the_rows_that_come_next(opened: Any) -> None:
    cache, some = opened(Builder(), mib=0), rows(40)
    most = 0
    for row in cache.ahead(some, VIEWS):
        most = max(most, len(cache._ahead))
        cache.student(row)
    assert most == 16 and not len(cache._kept)


def test_a_mistake_is_raised_where_its_row_is_asked_for(opened: Any) -> None:
    some = rows(3)
    some[1] = replace(some[1], rationale="<end>")
    for workers in (0, 2):
        cache = opened(Builder(), workers=workers)
        cache.prepare(some, VIEWS)
        assert cache.teacher(some[0]).length and cache.teacher(some[2]).length
        with pytest.raises(InputError, match=r"rows\.jsonl:1: field 'rationale'"):
            cache.teacher(some[1])
        assert cache.damage(some[1]) is None, "its files are whole"


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_looked_at_once_and_told_once(opened: Any, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    builder, some = Builder(damaged=(1, 3)), rows(5)
    cache = opened(builder, workers=workers)
    with caplog.at_level("WARNING", "opsd"):
        cache.prepare(some, VIEWS)
        for _ in range(2):
            assert [row.line for row in cache.whole(some)] == [0, 2, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped: rows.jsonl:{line}: field 'prompt': expected a video; found none" for line in (1, 3)
    ]
    assert sorted(builder.looked) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_ends_or_leaves_out(opened: Any, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    some = rows(20)
    with pytest.raises(InputError, match=r"(?s)rows\.jsonl:3: .*rows\.jsonl:17: "):
        verify(opened(Builder(damaged=(3, 17)), workers=workers), some, VIEWS, skip=False)
    with caplog.at_level("WARNING", "opsd"):
        verify(opened(Builder(damaged=(3, 17)), workers=workers), some, VIEWS, skip=True)
    assert caplog.records[-1].getMessage() == "skipped rows: 2 of 20"
    some[5] = replace(some[5], rationale=None)
    with pytest.raises(InputError, match=r"^rows\.jsonl:5: field 'rationale'"):  # not of a file: never left out
        verify(opened(Builder(damaged=(3, 17)), workers=workers), some, VIEWS, skip=True)


def test_the_views_of_a_row_hold_its_media_once(opened: Any) -> None:
    class Seeing(Builder):
        """A row's media are its line; a teacher may have more of them."""

        def student(self, row: Example) -> Prompt:
            prompt = super().student(row)
            return replace(prompt, inputs={**prompt.inputs, "pixel_values": torch.full((2, 3), row.line)})

        def teacher(self, row: Example) -> Prompt:
            prompt = super().teacher(row)
            more = row.line % 2
            return replace(prompt, inputs={**prompt.inputs, "pixel_values": torch.full((2 + more, 3), row.line)})

    cache = opened(Seeing())
    for row, shares in zip(rows(2), (True, False), strict=True):
        student, teacher = cache.student(row).inputs, cache.teacher(row).inputs
        assert (student["pixel_values"] is teacher["pixel_values"]) is shares
        assert teacher["input_ids"].shape[1] > student["input_ids"].shape[1]
        assert teacher["pixel_values"].shape[0] == (2 if shares else 3)
