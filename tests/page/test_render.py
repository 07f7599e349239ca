"""The page as HTML: whole, alone, and deaf to what texts say."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import wave

import numpy as np
import pytest
from PIL import Image

from opsd.config import load_config
from opsd.page import media
from opsd.page.media import picture, sound
from opsd.page.replay import Answer, Candidate, Replayed, Side, Token
from tests.files import tone, write_wav
from tests.page.pages import HOSTILE, Reader, clip, token, write_page

CONFIG = load_config(None, ["model.path=x"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return Reader.of(write_page(folder, CONFIG, [clip(folder, "a plain text")]))


def test_everything_is_inside_the_file(plain):
    for element in plain.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"{element.tag} {name}"
            if name in ("src", "href", "srcset", "poster", "action"):
                assert value.startswith("data:")
    assert {e.tag for e in plain.elements} & {"link", "iframe", "object", "embed", "base", "form"} == set()
    style = plain.all("style")[0].text
    assert "url(" not in style and "@import" not in style


def test_the_policy_lets_nothing_in_and_runs_the_one_script(plain):
    policy = plain.all("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    scripts = [e for e in plain.all("script") if "type" not in e.attributes]
    digest = base64.b64encode(hashlib.sha256(scripts[0].text.encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_a_clip_has_its_picture_its_sound_and_its_wave(plain):
    shown = [e.attributes["src"] for e in plain.all("img")]
    assert len(shown) == 2, "its own, and the one that only the teacher sees"
    with Image.open(io.BytesIO(base64.b64decode(shown[0].split(",")[1]))) as image:
        assert image.size == (40, 30) and image.getpixel((0, 0)) == (200, 30, 30)
    data = base64.b64decode(plain.all("audio")[0].attributes["src"].split(",")[1])
    with wave.open(io.BytesIO(data)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
        assert file.getframerate() == 16_000
    np.testing.assert_allclose(samples, tone(16_000, 220, 0.2), atol=1e-3)
    assert any(e.attributes["d"].endswith("Z") for e in plain.all("path"))


def test_tokens_are_coloured_by_their_divergence_and_carry_their_numbers(plain):
    answer = plain.all("p", class_="answer")
    spans = [e for e in plain.all("span") if e.attributes.get("style", "").startswith("--d:")]
    assert len(answer) == 2 and len(spans) == 6
    assert [e.attributes["style"] for e in spans[:3]] == ["--d:1.000", "--d:0.000", "--d:0.000"]
    assert [e.text for e in spans[:3]] == ["a plain text", "b", "c⏎\n"]
    assert [e.attributes.get("tabindex") for e in spans[:3]] == ["0", None, None], "one Tab stop per answer"
    first = plain.data()["answers"][int(answer[1].attributes["data-answer"])][0]
    assert first["d"] == 0.25 and first["student"]["top"][0] == ["a plain text", 0.5, 1]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_texts_stay_texts(tmp_path, plain, text):
    page = Reader.of(write_page(tmp_path, CONFIG, [clip(tmp_path, text)]))
    assert [e.tag for e in page.elements] == [e.tag for e in plain.elements], "no text became an element"
    told = [e.text for e in page.all("p") if e.attributes.get("class", "").startswith("text")]
    assert told == [text] * 3, "prompt, subtitle, rationale"
    spans = [e for e in page.all("span") if e.attributes.get("style", "").startswith("--d:")]
    assert spans[0].text == text and page.all("span", class_="label")[0].text == text
    assert page.data()["answers"][0][0]["student"]["top"][0][0] == text


def test_numbers_that_are_not_finite_leave_the_data_readable(tmp_path):
    broken = Token("x", None, Side(None, None, []), None)
    one = clip(tmp_path, "a")
    html = write_page(tmp_path, CONFIG, [Replayed(one.row, Answer("x", None, [broken]), one.after)])

    def refuse(name):
        raise AssertionError(name)

    script = Reader.of(html).all("script", id="data")[0].text
    assert json.loads(script, parse_constant=refuse)["answers"][0][0]["student"] == {"p": None, "h": None, "top": []}


def test_no_clips_no_section_of_them(tmp_path):
    page = Reader.of(write_page(tmp_path, CONFIG, []))
    assert not page.all("article") and len(page.all("figure", class_="chart")) == 3


@pytest.mark.parametrize(
    "words, said",
    [
        (["objective.divergence=reverse_kl"], "reverse KL"),
        (["objective.beta=0.25"], "β = 0.25"),
        (["teacher.kind=frozen"], "after it the starting model"),
        (["objective.kind=reward"], "after it the student itself"),
        (["prompts.privilege=none"], "the teacher (before"),
        (["model.adapter=lora", "model.lora_r=3"], "LoRA of rank 3"),
    ],
)
def test_the_page_says_what_the_run_was(tmp_path, words, said):
    config = load_config(None, ["model.path=x", *words])
    assert said in " ".join(write_page(tmp_path, config, [clip(tmp_path, "a")]).split())


def test_colours_tell_small_divergences_apart(tmp_path):
    one = clip(tmp_path, "a")
    answer = Answer("x", None, [token("x", d) for d in (0.0, 0.01, 0.04, 0.16)])
    page = Reader.of(write_page(tmp_path, CONFIG, [Replayed(one.row, answer, answer)]))
    styles = [e.attributes["style"] for e in page.all("span") if e.attributes.get("style", "").startswith("--d:")]
    assert styles[:4] == [f"--d:{math.sqrt(d / 0.16):.3f}" for d in (0.0, 0.01, 0.04, 0.16)]


def test_large_media_are_reduced(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (900, 1600, 3), np.uint8)).save(tmp_path / "large.png")
    found = picture(tmp_path / "large.png")
    assert (found.width, found.height) == (360, 202) or found.width == 360
    assert found.uri.startswith("data:image/jpeg") and len(found.uri) < 150_000
    monkeypatch.setattr(media, "LONGEST_SOUND", 0.5)
    long = sound(write_wav(tmp_path / "long.wav", tone(16_000, 220, 2.0)))
    assert (long.seconds, long.shown_seconds) == (2.0, 0.5) and len(long.uri) < 0.5 * 16_000 * 2 * 1.4


def test_a_silent_sound_has_a_flat_wave(tmp_path):
    shape = sound(write_wav(tmp_path / "silent.wav", np.zeros(50))).shape
    assert shape.startswith("M") and "nan" not in shape


def test_many_long_answers_stay_small(tmp_path):
    side = Side(0.5, 1.0, [Candidate("word", 0.123456789, False)] * 5)
    answer = Answer("x", None, [Token(" word", 0.123456789, side, side)] * 500)
    row = clip(tmp_path, "a").row
    assert len(write_page(tmp_path, CONFIG, [Replayed(row, answer, answer)] * 8)) < 5e6
