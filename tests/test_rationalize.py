"""Rationales from an endpoint: what is asked, what is written, and what a kill, a failure or a bad reply leaves."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from opsd import rationalize
from opsd.config import DataConfig
from opsd.data import read_examples
from opsd.rationales.request import DEFAULT, read_template
from opsd.rationales.store import moved
from opsd.rationales.work import GIVE_UP
from tests.endpoints import FakeClock, completion, serving
from tests.files import tone, write_wav
from tests.videos import pictures, write_video

KEY = "sk-very-secret-123"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def server():
    with serving() as made:
        yield made


@pytest.fixture
def clock(monkeypatch):
    made = FakeClock()
    monkeypatch.setattr("opsd.rationales.command.Clock", lambda: made)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return made


@pytest.fixture
def rows(tmp_path):
    """Writes rows.jsonl: ids from 1, a label each, what is given besides."""

    def make(*given):
        path = tmp_path / "rows.jsonl"
        made = [{"id": n, "prompt": f"What does {n} feel?", "label": "sad"} | row for n, row in enumerate(given, 1)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), "utf-8")
        return path

    return make


def command(path, server, *more):
    out = path.parent / "out.jsonl"
    return [str(path), "--out", str(out), "--endpoint", server.url, "--model", "m", "--concurrency", "1", *more]


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def user(body):
    return body["messages"][-1]["content"]


def test_a_video_goes_as_frames_with_their_times(rows, server, clock, tmp_path):
    frames = pictures(12)
    write_video(tmp_path / "a.avi", frames, rate=10, sound=tone(16_000, 300, 1.2))
    parts = [{"type": "video", "video": "a.avi"}, {"type": "audio", "audio": "a.avi"}]
    path = rows({"prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": "Feels?"}]}]})
    assert rationalize.main([*command(path, server), "--media", "video,audio"]) == 0
    told, *shown, heard, text = user(server.seen[0][2])
    assert told["text"] == "Frames of a video, at 0.1, 0.3, 0.5, 0.7, 0.9, 1.1 s:"
    assert "Attached: 1 recording, 1 video." in text["text"] and heard["input_audio"]["format"] == "wav"
    for part, frame in zip(shown, frames[1::2], strict=True):
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        assert np.abs(np.asarray(Image.open(io.BytesIO(data))).mean((0, 1)) - frame.mean((0, 1))).max() < 3


def test_every_labelled_row_gets_its_rationale(rows, server, clock, tmp_path, capsys):
    path = rows({"subtitle": "Nun ja … 😀"}, {"label": None}, {"rationale": "Tears."}, {"privileged_context": "Sobs."})
    server.reply = lambda body: completion("  <think>hm</think>\n她皱着眉头, très bas. ")
    assert rationalize.main(command(path, server, "--price-in", "3", "--price-out", "15")) == 0
    out = read(tmp_path / "out.jsonl")
    assert out[0] == read(path)[0] | {"rationale": "她皱着眉头, très bas."}
    assert out[1:] == read(path)[2:], "a rationale that is there stays"
    said = capsys.readouterr().out
    assert "4 rows: 1 to ask for, 2 have a rationale (--replace asks anew), 1 left out, without a label" in said
    assert "1 rationales: 100 prompt, 20 reply tokens, cost 0.0006" in said
    assert "leak" not in said
    examples = read_examples(tmp_path / "out.jsonl", DataConfig())
    assert [example.id for example in examples] == ["1", "3", "4"], "the trainer reads it"
    (source,) = read(tmp_path / "out.provenance.jsonl")
    assert (source["id"], source["model"], source["prompt_tokens"], source["reply_tokens"]) == ("1", "m", 100, 20)
    assert source["template"] == read_template(DEFAULT).digest and source["finish_reason"] == "stop"


def test_the_prompt_has_task_subtitle_and_label_and_no_slot_of_theirs(rows, server, clock):
    path = rows({"subtitle": "{label}", "prompt": [{"role": "user", "content": [{"type": "text", "text": "Feels?"}]}]})
    assert rationalize.main(command(path, server, "--body", '{"temperature": 0.2}')) == 0
    _, _, body = server.seen[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 1024, 0.2)
    assert body["messages"][0]["role"] == "system"
    for part in ("Task: Feels?", "The task is all there is", "Subtitle: {label}\n", "for you alone: sad"):
        assert part in user(body)


def test_replace_asks_again_and_body_takes_settings_out(rows, server, clock, tmp_path):
    path = rows({"privileged_context": "Sobs."})
    more = ["--replace", "--body", '{"max_tokens": null, "max_completion_tokens": 9}']
    assert rationalize.main(command(path, server, *more)) == 0
    assert read(tmp_path / "out.jsonl") == [
        {"id": 1, "prompt": "What does 1 feel?", "label": "sad", "rationale": "Her brows are raised."}
    ]
    assert "max_tokens" not in server.seen[0][2] and server.seen[0][2]["max_completion_tokens"] == 9


def test_media_are_attached_when_asked_for(rows, server, clock, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.bmp")
    write_wav(tmp_path / "a.wav", tone(16000, 440.0, 0.1))
    with av.open(str(tmp_path / "b.flac"), "w") as container:
        stream = container.add_stream("flac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    parts = [{"type": "image", "image": "a.png"}, {"type": "audio", "audio": "a.wav"}]
    parts += [{"type": "audio", "audio": "b.flac"}, {"type": "text", "text": "Feels?"}]
    late = [{"type": "image", "image": "b.bmp"}]
    path = rows({"prompt": [{"role": "user", "content": parts}], "teacher_media": late})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = command(path, server)
    words[2] = str(elsewhere / "out.jsonl")
    assert rationalize.main([*words, "--media", "image,audio"]) == 0
    image, wav, flac, bmp, text = user(server.seen[0][2])
    assert image["image_url"]["url"] == f"data:image/png;base64,{encoded(tmp_path / 'a.png')}"
    assert wav["input_audio"] == {"data": encoded(tmp_path / "a.wav"), "format": "wav"}
    (tmp_path / "flac.wav").write_bytes(base64.b64decode(flac["input_audio"]["data"]))
    with wave.open(str(tmp_path / "flac.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getnframes()) == (16000, 1, 1600)
    assert base64.b64decode(bmp["image_url"]["url"].partition(",")[2]).startswith(b"\x89PNG")
    assert "Attached: 2 images, 2 recordings." in text["text"]
    (example,) = read_examples(elsewhere / "out.jsonl", DataConfig())
    assert {file.resolve() for _, _, file in example.media()} == {
        tmp_path / name for name in ("a.png", "a.wav", "b.flac", "b.bmp")
    }, "paths still lead to the files from another folder"
    row = {"prompt": "Feels?", "teacher_images": ["../a.png"]}
    assert moved(row, tmp_path / "x", elsewhere)["teacher_images"] == ["../a.png"]
    assert moved(row, elsewhere, tmp_path)["teacher_images"] == ["a.png"]
    assert rationalize.main([*command(path, server), "--media", "image"]) == 0
    assert "Attached: 2 images. Not shown to you: 2 recordings;" in user(server.seen[1][2])[-1]["text"]


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


def test_what_is_done_is_not_asked_again_and_the_order_is_the_inputs(rows, server, clock, tmp_path, capsys):
    path, out = rows({}, {}, {}), tmp_path / "out.jsonl"
    server.script = [(400, {}, b"too long")]
    assert rationalize.main(command(path, server)) == 2
    captured = capsys.readouterr()
    assert "1 rows remain: 1 failed" in captured.out
    assert "rows.jsonl:1: field 'rationale': expected a reply; found HTTP 400: too long" in captured.err
    assert [row["id"] for row in read(out)] == [2, 3]
    assert rationalize.main(command(path, server)) == 0
    assert [row["id"] for row in read(out)] == [1, 2, 3]
    assert len(server.seen) == 4
    assert rationalize.main(command(path, server)) == 0 and len(server.seen) == 4


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_half_line_is_dropped_and_a_whole_one_kept(rows, server, clock, tmp_path, cut):
    path, out = rows({}, {}, {}), tmp_path / "out.jsonl"
    assert rationalize.main(command(path, server, "--limit", "2")) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    source = tmp_path / "out.provenance.jsonl"
    source.write_bytes(source.read_bytes()[:-cut])
    assert rationalize.main(command(path, server)) == 0
    assert out.read_bytes().startswith(whole)
    assert [row["id"] for row in read(out)] == [1, 2, 3]
    assert len(server.seen) == (3 if cut == 1 else 4)
    assert {record["id"] for record in read(source)} == {"1", "2", "3"}


def test_a_killed_process_is_continued(rows, server, clock, tmp_path):
    path, out = rows(*[{}] * 8), tmp_path / "out.jsonl"
    stuck, release = threading.Event(), threading.Event()

    def reply(body):
        if len(server.seen) > 5:
            stuck.set()
            release.wait(20)
        return completion("Her brows are raised.")

    server.reply = reply
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OPENAI_API_KEY": KEY}
    words = [sys.executable, "-m", "opsd.rationalize", *command(path, server)]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert stuck.wait(60)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    release.set()
    assert KEY.encode() not in said
    before = read(out)
    assert len(before) == 5
    server.reply = lambda body: completion("After the kill.")
    asked = len(server.seen)
    assert rationalize.main(command(path, server)) == 0
    assert len(server.seen) - asked == 3
    after = read(out)
    assert after[:5] == before and [row["id"] for row in after] == list(range(1, 9))
    assert all(KEY not in file.read_text("utf-8") for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (completion("Half a", finish="length"), "one that was cut at its token limit"),
        (completion("Half a", finish="content_filter"), "the endpoint's filter"),
        (completion(" \n"), "an empty one"),
        (completion(None), "an empty one"),
        (completion("\ud83d"), "half of a surrogate pair"),
        (b"{", "a reply that is no chat completion"),
    ],
)
def test_a_reply_that_no_row_may_hold_is_a_failure(rows, server, clock, tmp_path, capsys, reply, said):
    server.reply = lambda body: reply
    assert rationalize.main(command(rows({}), server)) == 2
    assert said in capsys.readouterr().err
    assert read(tmp_path / "out.jsonl") == []


def test_passing_failures_are_waited_out(rows, server, clock, tmp_path):
    server.script = [(429, {"Retry-After": "30"}, b""), (500, {}, b""), (200, {}, b"{")]
    assert rationalize.main(command(rows({}), server)) == 0
    assert clock.slept[0] == 30 and len(clock.slept) == 3
    assert len(read(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(("limit", "minutes"), [("--requests-per-minute=2", 2), ("--tokens-per-minute=1350", 4)])
def test_the_pace_is_kept(rows, server, clock, limit, minutes):
    """A request is thought to cost about 1300 tokens (1024 of them the reply's limit) and costs 120."""
    assert rationalize.main(command(rows(*[{}] * 5), server, limit)) == 0
    assert clock.time == 1000 + minutes * 60


def test_requests_are_bounded_in_number(rows, server, clock, tmp_path):
    flying, most, lock, together = [0], [0], threading.Lock(), threading.Barrier(3, timeout=20)

    def reply(body):
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
        together.wait()
        with lock:
            flying[0] -= 1
        return completion("Her brows are raised.")

    server.reply = reply
    assert rationalize.main([*command(rows(*[{}] * 6), server), "--concurrency", "3"]) == 0
    assert most[0] == 3
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_missing_key_is_named_and_stops_the_work(rows, server, clock, capsys):
    server.reply = lambda body: completion("never")
    server.script = [(401, {}, b"no key")] * 3
    assert rationalize.main(command(rows({}, {}, {}), server)) == 2
    assert len(server.seen) == 1 and "Authorization" not in server.seen[0][1]
    assert "field 'OPENAI_API_KEY': expected a key; found none (HTTP 401: no key)" in capsys.readouterr().err


def test_the_key_is_in_the_header_and_nowhere_else(rows, server, clock, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script = [(400, {}, f"bad key {KEY}".encode()), (200, {}, f"<{KEY}>".encode())]
    assert rationalize.main(command(rows({}, {}), server)) == 2
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {f"Bearer {KEY}"}
    captured = capsys.readouterr()
    assert "bad key [key]" in captured.err
    assert KEY not in captured.out + captured.err + "".join(f.read_text("utf-8") for f in tmp_path.iterdir())
    assert "--key" not in rationalize.main.__globals__["parser"]().format_help()


def test_an_endpoint_that_is_down_is_given_up(rows, server, clock, capsys):
    server.reply = lambda body: b"down"
    assert rationalize.main(command(rows(*[{}] * (GIVE_UP + 5)), server, "--tries", "1")) == 2
    assert len(server.seen) == GIVE_UP
    captured = capsys.readouterr()
    assert f"{GIVE_UP + 5} rows remain, stopped early: {GIVE_UP} failed" in captured.out
    assert captured.err.count("expected a reply") == GIVE_UP, "every failure is listed"


def test_a_dry_run_asks_and_writes_nothing(rows, server, clock, tmp_path, capsys):
    path = rows({}, {})
    words = ["--dry-run", "--price-in", "1000", "--price-out", "1000", "--max-tokens", "500"]
    assert rationalize.main(command(path, server, *words)) == 0
    assert not server.seen and [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    said = capsys.readouterr().out
    assert "2 rows: 2 to ask for" in said and "at most 1000 reply tokens, cost 1." in said
    assert "--- 1 ---" in said and "What does 1 feel?" in said


def test_leaking_rationales_are_counted(rows, server, clock, capsys):
    server.reply = lambda body: completion("The label is sad.")
    assert rationalize.main(command(rows({}), server)) == 0
    assert "1 of 1 leak: python -m opsd.leaks" in capsys.readouterr().out


def test_a_medium_that_does_not_decode_is_its_rows_failure(rows, server, clock, tmp_path, capsys):
    (tmp_path / "a.bmp").write_bytes(b"no image")
    parts = [{"type": "image", "image": "a.bmp"}, {"type": "text", "text": "Feels?"}]
    path = rows({"prompt": [{"role": "user", "content": parts}]}, {})
    assert rationalize.main(command(path, server, "--media", "image")) == 2
    assert "rows.jsonl:1: field 'prompt': expected an image that can be decoded" in capsys.readouterr().err
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--media", "smell"], "field '--media': expected some of image, audio, video; found 'smell'"),
        (["--body", "{"], "field '--body': expected a JSON object"),
        (["--body", '{"stream": true}'], "field '--body': expected a JSON object without"),
        (["--endpoint", "localhost"], "field '--endpoint': expected an http"),
        (["--out", "rows.jsonl"], "field '--out': expected another file than the rows"),
        (["--out", "gone/out.jsonl"], "field '--out': expected a .jsonl file in an existing folder"),
        (["--out", "other.jsonl"], "other.jsonl: expected only rows of rows.jsonl; found id 'x'"),
        (["--out", "broken.jsonl"], "broken.jsonl:1: expected a JSON record"),
        (["--template", "none.yaml"], "none.yaml: expected a YAML file"),
        (["--template", "slot.yaml"], "slot.yaml: field 'user': expected slots of task, media, subtitle, label"),
        (["--template", "blind.yaml"], "blind.yaml: field 'user': expected {label} in the text"),
        (["--template", "keys.yaml"], "keys.yaml: expected the keys user"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked(rows, server, clock, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    path = rows({})
    Path("other.jsonl").write_text('{"id": "x"}\n')
    Path("broken.jsonl").write_text('{"id"\n{"id": 1}\n')
    Path("slot.yaml").write_text('user: "{label} {subtitel}"')
    Path("blind.yaml").write_text("user: Describe.")
    Path("keys.yaml").write_text("usr: '{label}'")
    assert rationalize.main([*command(path, server), *more]) == 2
    assert said in capsys.readouterr().err
    assert not server.seen
