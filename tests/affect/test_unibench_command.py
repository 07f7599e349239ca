"""`python -m opsd.evaluate mer-unibench`, from files to the table."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from opsd import evaluate
from opsd.affect.clips import TRAIN, write_split
from opsd.affect.embedded import vocabulary
from opsd.affect.tiny import TinySize, build
from opsd.affect.unibench import infer
from opsd.affect.unibench.datasets import DATASETS
from opsd.affect.unibench.extract import Lexicon
from opsd.affect.unibench.journal import work_through
from opsd.affect.unibench.polarity import sentiment
from opsd.affect.unibench.prompts import clean_reply, read_prompts
from opsd.affect.unibench.published import PUBLISHED
from opsd.affect.unibench.second_model import local
from opsd.affect.unibench.truth import read_truth
from opsd.affect.unibench.wheels import load_wheels
from opsd.config import load_config
from opsd.errors import InputError
from opsd.train import train
from tests.affect.wheel_files import write_corpus, write_csv, write_data, write_predictions, write_wheels
from tests.files import tone, write_wav
from tests.jobs import text_job
from tests.models import save_text_model

QWEN = '''
def reason_to_openset_qwen(model=None, reason=None):
    def func_prompt_template(reason):
        prompt = f"""Which emotions? \\
Input: {reason}; Output: """
        return prompt
    raise SystemExit("never run")

def openset_to_sentiment_qwen(reason=None):
    def func_prompt_template(reason):
        prompt = f"Which side? {reason}"
        return prompt
'''


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data")
    write_wheels(tmp_path / "wheels")
    (tmp_path / "qwen.py").write_text(QWEN)
    return tmp_path


def words(folder, *more):
    return ["mer-unibench", "--data", str(folder / "data"), "--wheels", str(folder / "wheels"), *map(str, more)]


def responses(folder, dataset, text, stem="checkpoint_000010_loss_0.5"):
    clips = read_truth(DATASETS[dataset], folder / "data")
    reasons = {name: text(truth) for name, truth in clips.items()}
    return write_predictions(folder / "said", dataset, stem, name2reason=np.array(reasons, dtype=object))


def record(folder, out="said/mer-unibench"):
    return json.loads((folder / out / "report.json").read_text())


def perfect(truth):
    if isinstance(truth, float):
        truth = "cheerful" if truth > 0 else "gloomy"
    return f"<think>not happy at all</think><answer>{truth}</answer>"


def test_all_nine_from_responses(folder, capsys):
    for name in DATASETS:
        responses(folder, name, perfect)
    assert evaluate.main(words(folder, "--predictions", folder / "said")) == 0
    found = record(folder)
    assert found["mean"] == pytest.approx(100) and found["mean_low"] == pytest.approx(100)
    assert all(entry["score"] == pytest.approx(100) for entry in found["datasets"].values())
    assert {entry["labels"] for entry in found["datasets"].values()} == {"lexicon"}
    text = (folder / "said/mer-unibench/report.md").read_text()
    assert "| OmniOPSD, A+V+T | 85.79 | 92.43 | 71.89 |" in text and "| AffectGPT |  |  |" in text
    assert "MER2023: 3 clips, the benchmark has 411: not comparable." in text
    samples = [json.loads(line) for line in (folder / "said/mer-unibench/samples.jsonl").open()]
    assert len(samples) == sum(entry["clips"] for entry in found["datasets"].values())
    by_clip = {(s["dataset"], s["clip"]): s for s in samples}
    assert by_clip["mer2023", "a1"]["answer"] == ["happy"] and by_clip["mer2023", "a1"]["score"] == 1
    assert by_clip["mer2023", "a3"]["score"] is None, "a neutral clip leaves HIT"
    assert by_clip["sims", "v3"]["score"] is None, "a valence of 0 leaves WAF"
    assert "MER-UniBench" in capsys.readouterr().out


def test_datasets_are_resampled_independently(folder):
    """Four sets with the same clips and answers: the interval of the mean is half as wide as theirs."""
    clips = {f"v{n}": {"val": 1.0 if n % 2 else -1.0} for n in range(80)}
    names = ["cmumosi", "cmumosei", "sims", "simsv2"]
    for name in names:
        write_corpus(folder / f"data/{name}-process/label.npz", "test_corpus", clips)
        said = {clip: "positive" if n % 4 < 2 else "negative" for n, clip in enumerate(clips)}
        write_predictions(folder / "said", name, "c-openset-sentiment", filenames=[*said], fileitems=[*said.values()])
    assert evaluate.main(words(folder, "--predictions", folder / "said", "--datasets", ",".join(names))) == 0
    found = record(folder)
    widths = [entry["high"] - entry["low"] for entry in found["datasets"].values()]
    assert found["mean_high"] - found["mean_low"] == pytest.approx(np.mean(widths) / 2, rel=0.15)


def test_the_mean_is_unweighted_and_published_rows_add_up():
    own = PUBLISHED["OmniOPSD, A+V+T"]
    assert np.mean([own[name] for name in DATASETS]) == pytest.approx(own["mean"], abs=0.005)


def test_files_of_labels_are_used_as_they_are(folder):
    """No response is read, no model called: an unknown literal is neutral, and neutral counts as not positive."""
    items = {"v1": "Positive", "v2": "negative", "v3": "positive"}
    write_predictions(folder / "said", "sims", "c-openset-sentiment", filenames=[*items], fileitems=[*items.values()])
    labels = np.array([["happy"], "[Sad, unheard]", float("nan")], dtype=object)
    write_predictions(folder / "said", "mer2023", "c-openset", filenames=["a1", "a2", "a3"], fileitems=labels)
    assert evaluate.main(words(folder, "--predictions", folder / "said", "--datasets", "sims,mer2023")) == 0
    entries = record(folder)["datasets"]
    assert entries["sims"]["score"] == pytest.approx(100 / 3), "v1 missed, v2 right: half of 0, half of 2/3"
    assert entries["mer2023"]["score"] == pytest.approx(60), "sad and angry share a group in wheel 4 alone"
    assert entries["sims"]["labels"] == entries["mer2023"]["labels"] == "official file"
    text = (folder / "said/mer-unibench/report.md").read_text()
    assert "AffectGPT |" not in text, "a published mean over nine is not shown beside a mean over two"


def test_the_last_checkpoint_is_scored_and_the_best_when_asked(folder):
    responses(folder, "mer2023", perfect, "checkpoint_000010_loss_0.5")
    responses(folder, "mer2023", lambda truth: "serene", "checkpoint_000020_loss_0.5")
    command = words(folder, "--predictions", folder / "said", "--datasets", "mer2023")
    assert evaluate.main(command) == 0
    last = record(folder)["mean"]
    assert evaluate.main([*command, "--checkpoint", "best"]) == 0
    assert last < record(folder)["mean"] == pytest.approx(100)


def test_labels_of_responses_that_have_changed_are_extracted_again(folder):
    command = words(folder, "--predictions", folder / "said", "--datasets", "mer2023,sims")
    scores = []
    for text in (perfect, lambda truth: "<answer>serene</answer>", perfect):
        for name in ("mer2023", "sims"):
            responses(folder, name, text)
        assert evaluate.main(command) == 0
        scores.append(record(folder)["mean"])
    assert scores[0] == scores[2] == pytest.approx(100) and scores[1] < 60


def test_a_written_folder_scores_the_same_by_itself(folder):
    responses(folder, "sims", perfect)
    assert evaluate.main(words(folder, "--predictions", folder / "said", "--datasets", "sims")) == 0
    out = folder / "said/mer-unibench"
    first = record(folder)["datasets"]
    assert evaluate.main(words(folder, "--predictions", out, "--datasets", "sims")) == 0
    assert record(folder, "said/mer-unibench/mer-unibench")["datasets"] == first
    for path in (out / "results-sims").glob("*_0.5.npz"):
        path.unlink()
    (out / "results-sims" / "checkpoint_000010_loss_0.5-openset.npz").unlink()
    assert evaluate.main(words(folder, "--predictions", out, "--datasets", "sims")) == 0, "sentiments are enough"
    assert record(folder, "said/mer-unibench/mer-unibench")["datasets"] == first


def test_mistakes_are_told_together(folder, capsys):
    (folder / "data/sims-process/label.npz").unlink()
    (folder / "data/meld-process/label.npz").write_bytes(b"")
    command = words(folder, "--predictions", folder / "said")
    assert evaluate.main(command) == 2
    said = capsys.readouterr().err
    assert "sims-process/label.npz: expected an existing file" in said and "meld-process/label.npz" in said
    assert evaluate.main([*command, "--datasets", "mled"]) == 2
    assert "did you mean 'meld'?" in capsys.readouterr().err
    write_predictions(folder / "said", "mer2023", "c", name2reason=np.array({"a1": "x"}, dtype=object))
    assert evaluate.main([*command, "--datasets", "mer2023"]) == 2
    assert "c.npz: field 'name2reason': expected all 3 test clips; found 2 missing" in capsys.readouterr().err
    assert evaluate.main([*command, "--datasets", "mer2023", "--extractor", "http://x"]) == 2
    assert "field '--prompts'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("response", "labels"),
    [
        ("<think>angry</think><answer>happy, SAD</answer>", ["happy", "sad"]),
        ("<answer> </answer> He looks gloomy and low spirits show.", ["gloomy", "low spirits"]),
        ("She is not happy, sad instead; she isn't very angry. No sign of dread", ["sad", "dread"]),
        ("Cross, crossing, cross", ["cross"]),
        ("positive", ["positive"]),
        ("unlisted words only", []),
        ("", []),
    ],
)
def test_the_lexicon(folder, response, labels):
    assert Lexicon(load_wheels(folder / "wheels")).labels(response) == labels


@pytest.mark.parametrize(
    ("labels", "side"),
    [
        (["happy"], "positive"),
        (["serene", "sad", "gloomy"], "negative"),
        (["happy", "sad"], "neutral"),
        (["scared", "neutral"], "negative"),
        (["awed"], "positive"),  # not listed itself: its groups are
        ([], "neutral"),
    ],
)
def test_sentiment_of_labels(folder, labels, side):
    assert sentiment(labels, load_wheels(folder / "wheels")) == side


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, self.headers.get("Authorization"), body))
        if self.server.refuse:
            self.send_response(self.server.refuse.pop())
            self.end_headers()
            self.wfile.write(b"busy")
            return
        asked = body["messages"][0]["content"]
        reply = "Output: [happy]" if asked.startswith("Which emotions?") else "positive\n"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    made = HTTPServer(("127.0.0.1", 0), Server)
    made.bodies, made.refuse = [], []
    monkeypatch.setattr("opsd.pace.time.sleep", lambda seconds: None)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_an_endpoint_extracts_with_the_official_prompts(folder, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.refuse = [503]
    responses(folder, "sims", lambda truth: "He smiles.")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    command = words(folder, "--predictions", folder / "said", "--datasets", "sims", "--prompts", folder / "qwen.py")
    command += ["--extractor", url, "--extractor-model", "qwen"]
    assert evaluate.main(command) == 0
    asked = [body["messages"][0]["content"] for _, _, body in server.bodies]
    assert asked.count("Which emotions? Input: He smiles.; Output: ") == 3 + 1, "one was refused once"
    assert asked.count("Which side? [happy]") == 3
    path, key, body = server.bodies[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("qwen", 0.7, 0.8, 512)
    assert record(folder)["datasets"]["sims"]["labels"] == "qwen"
    before = len(server.bodies)
    assert evaluate.main(command) == 0 and len(server.bodies) == before, "its own files are used again"
    assert evaluate.main(words(folder, "--predictions", folder / "said", "--datasets", "sims")) == 0
    assert record(folder)["datasets"]["sims"]["labels"] == "lexicon", "another extractor's files are not"
    server.refuse = [401]
    capsys.readouterr()
    assert evaluate.main([*command, "--out", str(folder / "other")]) == 2
    assert "field '--extractor': expected a reply; found HTTP 401: busy" in capsys.readouterr().err


def test_prompts_are_read_without_running_the_file(folder):
    prompts = read_prompts(folder / "qwen.py")
    assert prompts.openset.fill("{x}") == "Which emotions? Input: {x}; Output: "
    (folder / "qwen.py").write_text(QWEN.replace("{reason}; Output", "{reason + 1}; Output"))
    with pytest.raises(InputError, match=r"qwen\.py: field 'reason_to_openset_qwen': expected one f-string"):
        read_prompts(folder / "qwen.py")
    with pytest.raises(InputError, match=r"gone\.py: expected the benchmark's toolkit/utils/qwen\.py"):
        read_prompts(folder / "gone.py")


@pytest.mark.parametrize(
    ("reply", "clean"),
    [
        (" Output: [happy,\n sad] ", "[happy, sad]"),
        ("输出\uff1apositive", "positive"),
        ("outputOutput: x", "x"),
        ("neutral", "neutral"),
        ("::x", ":x"),
    ],
)
def test_replies_are_cleaned_as_the_official_script_cleans_them(reply, clean):
    assert clean_reply(reply) == clean


def test_a_local_model_samples_from_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.affect.unibench.second_model.MAX_TOKENS", 8)
    save_text_model(tmp_path / "model")
    prompts = ["the face is sad", "a high voice"]
    first = local(tmp_path / "model", seed=5)(prompts)
    assert first == local(tmp_path / "model", seed=5)(prompts) != local(tmp_path / "model", seed=6)(prompts)


def test_a_trained_run_answers(folder, capsys):
    train(text_job(folder / "job", "train.steps=1"))
    write_csv(folder / "data/sims-process/transcription-engchi-polish.csv", "name,chinese,english", "v1,low,x", "v2,,")
    command = words(folder, "--model", folder / "job/run", "--datasets", "sims", "--media", "text")
    assert evaluate.main(command) == 0
    out = folder / "job/run/mer-unibench"
    rows = [json.loads(line) for line in (out / "rows/sims.jsonl").open()]
    assert rows[0] == {
        "id": "v1",
        "prompt": [{"role": "user", "content": [{"type": "text", "text": infer.QUESTION}]}],
        "subtitle": "low",
    }
    assert "subtitle" not in rows[1] and rows[2]["id"] == "v3"
    stored = np.load(out / "results-sims/step-000001.npz", allow_pickle=True)["name2reason"].tolist()
    assert stored.keys() == {"v1", "v2", "v3"}
    made = (out / "results-sims/step-000001.npz").stat().st_mtime_ns
    assert evaluate.main(command) == 0, "responses that are there are not made again"
    assert (out / "results-sims/step-000001.npz").stat().st_mtime_ns == made
    assert evaluate.main([*command, "--question", "How?"]) == 2, "responses to another question are not taken"
    said = capsys.readouterr().err
    assert "step-000001.npz: expected responses to 'text: How?'; found 'text: Please recognize all" in said
    train(text_job(folder / "job", "train.steps=1", "train.seed=7", f"train.run_dir={folder / 'job/other'}"))
    assert evaluate.main([*command, "--model", str(folder / "job/other"), "--out", str(out)]) == 2
    assert "step-000001.npz: expected responses of" in capsys.readouterr().err, "same name, other weights"
    assert evaluate.main([*command, "--media", "text,smell"]) == 2
    assert "expected some of video, audio, text" in capsys.readouterr().err


def test_a_clip_that_does_not_decode_ends_the_work_or_has_no_answer(folder, capsys, caplog):
    write_split(folder / "job", TRAIN, 0, 3)
    build(folder / "job/model", vocabulary(), TinySize(width=32, inner=64, layers=1, heads=2), seed=0)
    home = folder / "data/sims-process/video"
    home.mkdir(parents=True)
    for name in ("v1", "v2", "v3"):
        shutil.copy(next((folder / "job/clips").glob("*.avi")), home / f"{name}.avi")
    (home / "v2.avi").write_bytes(b"no video")
    for on_error in ("fail", "skip"):
        job = [f"model.path={folder / 'job/model'}", f"data.train={folder / 'job/train.jsonl'}", "train.steps=1"]
        job += ["train.prompts_per_step=1", "media.frames=1", "rollout.max_new_tokens=3", "log.progress=none"]
        job += [f"train.run_dir={folder / on_error}", f"data.on_error={on_error}"]
        train(load_config(None, job))
        command = words(folder, "--model", folder / on_error, "--datasets", "sims", "--media", "video")
        assert evaluate.main(command) == (2 if on_error == "fail" else 0)
    assert "sims.jsonl:2: field 'prompt[0].content[0].video'" in capsys.readouterr().err
    said = np.load(folder / "skip/mer-unibench/results-sims/step-000001.npz", allow_pickle=True)["name2reason"].tolist()
    assert said["v2"] == "" and said["v1"] and said["v3"]
    assert "no answer: " in caplog.text and "v2.avi" in caplog.text


def test_work_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.affect.unibench.journal.CHUNK", 2)
    asked = []

    def work(todo):
        asked.append(list(todo))
        if "e" in todo and len(asked) < 5:
            raise InputError("a reply", "none")
        return {name: text.upper() for name, text in todo.items()}

    todo, path = dict.fromkeys("abcdef", "x"), tmp_path / "deep" / "x.npz"
    for _ in range(2):
        with pytest.raises(InputError):
            work_through(path, "model 1", todo, work)
    assert asked == [["a", "b"], ["c", "d"], ["e", "f"], ["e", "f"]]
    journal = path.with_name("x.npz.partial")
    journal.write_text(journal.read_text() + '{"clip": "e", "te')  # killed in the middle of a line
    assert work_through(path, "model 1", todo, work) == dict.fromkeys("abcdef", "X")
    assert asked[4:] == [["e", "f"]] and not journal.exists()
    lines = ('{"what": "model 1"}', '{"clip": "a", "text": "one\u2028two\x85three"}', "")
    journal.write_text("\n".join(lines), encoding="utf-8")
    assert work_through(path, "model 1", {"a": "x"}, work) == {"a": "one\u2028two\x85three"}, "ends of lines in Unicode"
    journal.write_text('{"what": "model 2"}\n{"clip": "a", "text": "other"}\n')
    assert work_through(path, "model 1", {"a": "x"}, work) == {"a": "X"}, "other work is started over"


def test_rows_name_the_media_of_a_clip(folder):
    home = folder / "data/mer2023-dataset-process"
    (home / "video").mkdir()
    (home / "video" / "a2.avi").touch()
    write_csv(home / "transcription-engchi-polish.csv", "name,chinese", "a1,ni hao")
    (home / "audio").mkdir()
    write_wav(home / "audio" / "a1.wav", tone(16000, 200))
    infer.write_rows(folder / "rows.jsonl", DATASETS["mer2023"], ["a1", "a2"], folder / "data", infer.Task())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").open()]
    content = [row["prompt"][0]["content"] for row in rows]
    assert [part["type"] for part in content[0]] == ["video", "audio", "text"]
    assert content[0][0]["video"] == str(home / "video" / "a1.mp4"), "missing: where it is expected"
    assert content[1][0]["video"] == str(home / "video" / "a2.avi")
    assert content[0][1]["audio"] == str(home / "audio" / "a1.wav")
    assert rows[0]["subtitle"] == "ni hao" and "subtitle" not in rows[1]
