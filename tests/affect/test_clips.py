"""The procedural affect set: same seed, same bytes; truthful rationales; labels that need face and voice."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opsd.affect.clips import FRAMES, TEST, TRAIN, VALIDATION, Clip, every_text, make_clip, to_row, write_split
from opsd.affect.cues import FACES, LABELS, PAIRS, VOICES, label_of
from opsd.affect.faces import FaceRange, film
from opsd.affect.rationales import read_rationale
from opsd.affect.voices import RATE, VoiceRange, speak
from opsd.config import DataConfig
from opsd.data import read_examples
from opsd.media import load_audio, load_video

N = 600


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(TRAIN, 0, index)[0] for index in range(N)]


def folder_hash(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def best_guess(pairs: list[tuple[object, str]]) -> float:
    """Accuracy of the best rule that sees only the first of each pair."""
    counts: dict[object, Counter[str]] = {}
    for seen, label in pairs:
        counts.setdefault(seen, Counter())[label] += 1
    return sum(max(counter.values()) for counter in counts.values()) / len(pairs)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_split(tmp_path / name, TEST, seed, 6)
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")
    assert not set(folder_hash(tmp_path / "a").values()) & set(folder_hash(tmp_path / "c").values())


def test_rows_are_valid_and_clips_do_not_depend_on_the_size(tmp_path: Path) -> None:
    path = write_split(tmp_path / "12", TRAIN, 0, 12)
    examples = read_examples(path, DataConfig(labels=LABELS))
    assert [e.label for e in examples] == [*LABELS, *LABELS]
    assert all(e.rationale and e.answer and e.subtitle for e in examples)
    assert {kind for e in examples for _, kind, file in e.media() if file.exists()} == {"video", "audio"}
    short = write_split(tmp_path / "6", TRAIN, 0, 6)
    assert path.read_text().startswith(short.read_text())


def test_splits_share_no_clip(tmp_path: Path) -> None:
    hashes: list[str] = []
    for split in (TRAIN, VALIDATION, TEST):
        write_split(tmp_path / split.name, split, 0, 12)
        hashes += [h for name, h in folder_hash(tmp_path / split.name).items() if not name.endswith("jsonl")]
    assert len(hashes) == len(set(hashes)) == 3 * 12


def test_rationales_are_truthful_and_do_not_say_the_label(clips: list[Clip]) -> None:
    for clip in clips:
        face, voice = read_rationale(clip.rationale)
        assert (face, voice) == (clip.face, clip.voice)
        assert not any(label in clip.rationale.lower() for label in LABELS)
    assert len({clip.rationale for clip in clips}) > 0.98 * N


def test_the_label_follows_from_the_cues(clips: list[Clip]) -> None:
    for clip in clips:
        face, voice = read_rationale(clip.rationale)
        face_name = next(n for n, f in FACES.items() if f == face._replace(tear=False, blush=False))
        voice_name = next(n for n, v in VOICES.items() if v == voice)
        assert label_of(face_name, voice_name) == clip.label
    for label, pairs in PAIRS.items():
        assert {label_of(face, voice) for face, voice, _ in pairs} == {label}
        assert sum(share for _, _, share in pairs) == pytest.approx(1)


def test_face_and_voice_are_both_needed(clips: list[Clip]) -> None:
    assert best_guess([(c.face[:3], c.label) for c in clips]) < 0.65
    assert best_guess([(c.voice, c.label) for c in clips]) < 0.7
    assert best_guess([(c.subtitle, c.label) for c in clips]) < 0.3  # chance is 1/6; 12 subtitles fit some noise
    assert best_guess([(c.face[3:], c.label) for c in clips]) < 0.3  # tear and blush say nothing
    masked = [c for c in clips if c.face_name == "smiling" and c.label != "happy"]
    assert 0.1 < len(masked) / N < 0.3


def test_every_word_of_a_row_is_in_the_texts(clips: list[Clip]) -> None:
    def words(text: str) -> set[str]:
        return {word.strip('.,:;?"').lower() for word in text.replace("'", " ").split()}

    known = set().union(*(words(text) for text in every_text()))
    for clip in clips:
        row = to_row(clip)
        texts = [row["prompt"][0]["content"][-1]["text"], row["rationale"], row["answer"], row["subtitle"]]
        assert set().union(*(words(text) for text in texts)) <= known


def test_a_drawn_cue_changes_the_picture_where_it_should() -> None:
    """Same looks, another mouth: only the lower half of the face differs."""
    still = FaceRange(tilt=0.0, offset=0.0, noise=0.0)
    smiling, frowning = (
        film(FACES["smiling"]._replace(mouth=mouth), still, 1, np.random.default_rng(3))[0].astype(int)
        for mouth in ("curved", "drooping")
    )
    difference = np.abs(smiling - frowning).sum((1, 2))
    assert difference[36:].sum() > 0.99 * difference.sum() > 0


def test_the_head_moves_and_a_file_holds_what_was_drawn_and_said(tmp_path: Path) -> None:
    path = write_split(tmp_path, VALIDATION, 0, 3)
    moved = []
    for index, line in enumerate(path.read_text().splitlines()):
        clip, rng = make_clip(VALIDATION, 0, index)
        pictures, said = film(clip.face, VALIDATION.face, FRAMES, rng), speak(clip.voice, VALIDATION.voice, rng)
        file = tmp_path / json.loads(line)["prompt"][0]["content"][0]["video"]
        video = load_video(file, FRAMES)
        assert video.seconds == pytest.approx((0.0, 0.2, 0.4, 0.6)) and len(video.frames) == len(pictures)
        assert np.abs(video.frames.astype(int) - pictures).mean() < 8  # the codec has half the colours' resolution
        np.testing.assert_allclose(load_audio(file, RATE), said, atol=1e-4)
        moved.append(np.abs(pictures[-1].astype(int) - pictures[0]).mean())
    assert min(moved) > 4  # noise alone is below


def test_spoken_cues_are_in_the_sound() -> None:
    sounds = {name: speak(voice, VoiceRange(), np.random.default_rng(5)) for name, voice in VOICES.items()}
    assert all(s.dtype == np.float32 and 0.7 * RATE < len(s) < 0.9 * RATE for s in sounds.values())
    loud = {name: np.abs(s).max() for name, s in sounds.items()}
    assert min(loud["lively"], loud["harsh"]) > 3 * max(loud["trembling"], loud["dull"])

    def pitch(sound: np.ndarray) -> float:
        """Hz of the highest peak of the autocorrelation between 70 and 400 Hz, over the loudest tenth of a second."""
        start = int(np.argmax(np.convolve(sound**2, np.ones(1600), "valid")))
        piece = sound[start : start + 1600]
        lags = np.correlate(piece, piece, "full")[len(piece) :]
        return RATE / (np.argmax(lags[RATE // 400 : RATE // 70]) + RATE // 400 + 1)

    assert min(pitch(sounds["lively"]), pitch(sounds["trembling"])) > 170
    assert max(pitch(sounds["harsh"]), pitch(sounds["dull"])) < 160


def test_jsonl_paths_are_relative(tmp_path: Path) -> None:
    path = write_split(tmp_path, VALIDATION, 0, 1)
    row = json.loads(path.read_text())
    parts = row["prompt"][0]["content"]
    assert [part["type"] for part in parts] == ["video", "audio", "text"]
    assert parts[0]["video"] == parts[1]["audio"] and (tmp_path / parts[0]["video"]).is_file()
