"""A trained student's responses to the test clips, in the official file.

The rows are written first, as OUT/rows/DATASET.jsonl, and read back like any other rows: `opsd.rows` checks them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from opsd.affect.unibench.datasets import Dataset
from opsd.affect.unibench.files import Predictions, noted, write_responses
from opsd.affect.unibench.journal import work_through
from opsd.affect.unibench.tables import read_table
from opsd.answers import answer, finished_run, load_student
from opsd.data import Example, read_examples
from opsd.errors import InputError, MediumError, writing
from opsd.manifest import identity
from opsd.model import LanguageModel
from opsd.prompts import Prompt, PromptBuilder

QUESTION: Final = "Please recognize all possible emotional states of the character."
REASONING: Final = "Please infer the person's emotional state and provide your reasoning process."
MEDIA: Final = ("video", "audio", "text")
_VIDEOS: Final = (".mp4", ".avi")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What the student is given: some of video, audio and text (the subtitle), and a question."""

    media: tuple[str, ...] = MEDIA
    question: str = QUESTION

    @staticmethod
    def of(media: str, question: str) -> Task:
        chosen = tuple(name.strip() for name in media.split(","))
        if not chosen or set(chosen) - set(MEDIA):
            raise InputError(f"some of {', '.join(MEDIA)}", repr(media), field="--media")
        return Task(chosen, question)

    def __str__(self) -> str:
        return f"{', '.join(self.media)}: {self.question}"


class Student:
    """The newest checkpoint of a run, loaded when the first dataset needs it."""

    def __init__(self, run_dir: Path, task: Task) -> None:
        self.config, self.checkpoint = finished_run(run_dir)
        self.task = task
        self._model: LanguageModel | None = None

    def respond(self, dataset: Dataset, clips: Iterable[str], data: Path, out: Path) -> Predictions:
        """Responses to every clip, as OUT/results-DATASET/STEM.npz.

        A file that is there is not made again; one of another task, or of another model, is an `InputError`.
        """
        place = Predictions(out / f"results-{dataset.name}", self.checkpoint.resolve().name)
        path, task, model = place.responses, str(self.task), identity(self.checkpoint)
        if not path.is_file():
            rows = out / "rows" / f"{dataset.name}.jsonl"
            write_rows(rows, dataset, clips, data, self.task)
            todo = {example.id: example for example in read_examples(rows, self.config.data, held_out=True)}
            print(f"{dataset.title}: answering {len(todo)} clips", flush=True)
            write_responses(path, work_through(path, f"{task} {model}", todo, self._answers), task, model)
        elif noted(path, "task") != task:
            found = repr(noted(path, "task"))
            raise InputError(f"responses to {task!r}", found, file=path, hint="another --out keeps both")
        elif noted(path, "model") != model:
            expected, hint = f"responses of {self.checkpoint}", "another --out keeps both"
            raise InputError(expected, "those of another model", file=path, hint=hint)
        return place

    def _answers(self, examples: dict[str, Example]) -> dict[str, str]:
        self._model = self._model or load_student(self.config, self.checkpoint)
        prompts = PromptBuilder(self._model.processor, self.config.prompts, self.config.media)
        names, size = list(examples), self.config.evaluate.batch_size
        texts: dict[str, str] = dict.fromkeys(names, "")
        for first in range(0, len(names), size):  # a prompt of a video is large: one batch at a time
            built = {name: self._prompt(prompts, examples[name]) for name in names[first : first + size]}
            asked = {name: prompt for name, prompt in built.items() if prompt is not None}
            texts |= dict(zip(asked, answer(self._model, asked.values(), size, self.config.rollout), strict=True))
        return texts

    def _prompt(self, prompts: PromptBuilder, example: Example) -> Prompt | None:
        """None for a clip that does not decode, where the run skips such rows: it counts as one without an answer."""
        try:
            return prompts.student(example)
        except MediumError as error:
            if self.config.data.on_error != "skip":
                raise
            log.warning("no answer: %s", error)
            return None


def write_rows(path: Path, dataset: Dataset, clips: Iterable[str], data: Path, task: Task) -> None:
    """One row per clip, media by absolute path."""
    home = data / dataset.folder
    subtitles = _subtitles(dataset, home) if "text" in task.media else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("w", encoding="utf-8") as file:
        for name in clips:
            parts: list[dict[str, Any]] = []
            if "video" in task.media:
                parts.append({"type": "video", "video": str(_video(home / dataset.video, name))})
            if "audio" in task.media:
                parts.append({"type": "audio", "audio": str((home / dataset.audio / f"{name}.wav").absolute())})
            parts.append({"type": "text", "text": task.question})
            row: dict[str, Any] = {"id": name, "prompt": [{"role": "user", "content": parts}]}
            if subtitles.get(name):
                row["subtitle"] = subtitles[name]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _subtitles(dataset: Dataset, home: Path) -> dict[str, str]:
    rows = read_table(home / dataset.subtitles, ("name", dataset.language))
    return {row.text("name"): row[dataset.language].strip() for row in rows}


def _video(folder: Path, name: str) -> Path:
    """The clip's file; when there is none, the path where it is expected."""
    paths = [(folder / f"{name}{suffix}").absolute() for suffix in _VIDEOS]
    return next((path for path in paths if path.is_file()), paths[0])
