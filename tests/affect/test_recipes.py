"""Every recipe on a miniature copy of the layout it reads, made on the spot."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opsd.affect.recipes.command import main
from opsd.affect.recipes.registry import RECIPES
from opsd.config import DataConfig
from opsd.data import read_examples
from opsd.errors import InputError
from tests.affect.wheel_files import write_corpus, write_csv
from tests.files import tone, write_wav


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def clips_of(name, root, fold=1):
    return RECIPES[name].read(root, fold)


def short(clips):
    """(id, split, label, words) of each."""
    return [(c.id, c.split, c.label, c.subtitle) for c in clips]


def meld(root, nested=False):
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    folders = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
    for split, folder in folders.items():
        home = root / split if nested else root
        write_csv(
            home / f"{split}_sent_emo.csv",
            header,
            '1,"None, really?",Joey,surprise,neutral,0,0,1,1,a,b',
            "2,Sure.,Ross,joy,positive,0,1,1,1,a,b",
            "3,Bye,Ross,neutral,neutral,1,0,1,1,a,b",
        )
        touch(*(home / folder / f"{name}.mp4" for name in ("dia0_utt0", "dia0_utt1")))
    return root


@pytest.mark.parametrize("nested", [False, True])
def test_meld(tmp_path, nested):
    clips = clips_of("meld", meld(tmp_path, nested))
    assert short(clips)[:3] == [
        ("train_dia0_utt0", "train", "surprise", "None, really?"),
        ("train_dia0_utt1", "train", "joy", "Sure."),
        ("train_dia1_utt0", "train", "neutral", "Bye"),
    ]
    assert [c.split for c in clips] == ["train"] * 3 + ["validation"] * 3 + ["test"] * 3
    assert clips[1].context == ("Joey: None, really?",) and clips[2].context == (), "a dialogue of its own"
    assert clips[1].video.is_file() and not clips[2].video.is_file()
    assert clips[2].video.parts[-2:] == ("train_splits", "dia1_utt0.mp4")


def test_mintrec2(tmp_path):
    header = "Dialogue_id\tUtterance_id\tText\tLabel\tStart_timestamp\tEnd_timestamp\tSource\tspeaker_name"
    rows = ["0\t0\tI am so sorry.\tApologise\ta\tb\tfriends\tRoss", "0\t1\tHm\tUNK\ta\tb\tfriends\tRachel"]
    for split in ("train", "dev", "test"):
        write_csv(tmp_path / "in-scope" / f"{split}.tsv", header, *rows, "0\t2\tFine\tAgree\ta\tb\tfriends\tRoss")
    touch(tmp_path / "video_data" / "dia0_utt0.mp4")
    clips = clips_of("mintrec2", tmp_path)
    assert short(clips)[:3] == [
        ("train_dia0_utt0", "train", "Apologise", "I am so sorry."),
        ("train_dia0_utt1", "train", None, "Hm"),  # out of scope: no row, but context of the next
        ("train_dia0_utt2", "train", "Agree", "Fine"),
    ]
    assert clips[2].context == ("Ross: I am so sorry.", "Rachel: Hm") and clips[0].video.is_file()
    write_csv(tmp_path / "in-scope" / "train.tsv", header, '0\t0\t"No way\tDoubt\ta\tb\tf\tRoss', *rows[1:])
    said = [clip.subtitle for clip in clips_of("mintrec2", tmp_path) if clip.split == "train"]
    assert said == ['"No way', "Hm"], "a quotation mark that is not closed swallows nothing"
    write_csv(tmp_path / "in-scope" / "dev.tsv", header, "0\t0\tx\tShout\ta\tb\tc\td")
    with pytest.raises(InputError, match=r"dev\.tsv:2: field 'Label': expected one of the 30 intents, or UNK; found"):
        clips_of("mintrec2", tmp_path)


def iemocap(root, video=False):
    for n in range(1, 6):
        dialogue = f"Ses0{n}F_impro01"
        home = root / f"Session{n}" / "dialog"
        (home / "EmoEvaluation").mkdir(parents=True)
        (home / "transcriptions").mkdir()
        (home / "EmoEvaluation" / f"._{dialogue}.txt").write_bytes(b"\x00\x05")
        (home / "EmoEvaluation" / f"{dialogue}.txt").write_text(
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
            f"[6.2901 - 8.2357]\t{dialogue}_F000\tneu\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n"
            f"[8.3 - 9.1]\t{dialogue}_M000\texc\t[2.5000, 2.5000, 2.5000]\n"
            f"[9.2 - 9.9]\t{dialogue}_F001\txxx\t[2.5000, 2.5000, 2.5000]\n"
        )
        (home / "transcriptions" / f"{dialogue}.txt").write_text(
            f"{dialogue}_F000 [006.2901-008.2357]: Excuse me.\n"
            f"{dialogue}_FXX0 [008.2400-008.2800]: Mm.\n"
            f"{dialogue}_M000 [008.3000-009.1000]: Do you have your forms?\nM: aside\n"
            f"{dialogue}_F001 [009.2000-009.9000]: Yeah.\n"
        )
        touch(root / f"Session{n}" / "sentences" / "wav" / dialogue / f"{dialogue}_F000.wav")
        if video:
            touch(root / "subvideo-tgt" / f"{dialogue}_M000.avi")
    return root


def test_iemocap(tmp_path):
    clips = clips_of("iemocap", iemocap(tmp_path / "plain"))
    assert short(clips)[:3] == [
        ("Ses01F_impro01_F000", "train", "neutral", "Excuse me."),
        ("Ses01F_impro01_M000", "train", "happy", "Do you have your forms?"),  # excited counts as happy
        ("Ses01F_impro01_F001", "train", None, "Yeah."),
    ]
    assert [c.split for c in clips[-3:]] == ["test"] * 3, "session 5"
    assert clips[1].context == ("Woman: Excuse me.", "Woman: Mm.") and clips[0].video is None
    assert clips[0].audio.is_file() and not clips[1].audio.is_file()
    with_video = clips_of("iemocap", iemocap(tmp_path / "video", video=True))
    assert with_video[1].video.is_file() and with_video[0].video.name == "Ses01F_impro01_F000.avi"


def test_mer(tmp_path):
    write_csv(tmp_path / "23" / "train-label.csv", "name,discrete,valence", "s1,happy,1.5")
    write_csv(tmp_path / "23" / "test1-label.csv", "name,discrete,valence", "s1,worried,-1")
    write_csv(tmp_path / "23" / "transcription-engchi-polish.csv", "name,chinese,english", "s1,ni hao,hello")
    touch(tmp_path / "23" / "train" / "s1.avi", tmp_path / "23" / "test1" / "s1.mp4")
    clips = clips_of("mer2023", tmp_path / "23")
    assert short(clips) == [("s1", "train", "happy", "ni hao"), ("test1_s1", "test", "worried", "ni hao")]
    assert [c.video.name for c in clips] == ["s1.avi", "s1.mp4"]
    write_csv(tmp_path / "24" / "label-disdim.csv", "name,discrete,valence", "s2,surprise,0")
    touch(tmp_path / "24" / "video-labeled" / "s2.mp4")
    assert short(clips_of("mer2024", tmp_path / "24")) == [("s2", "train", "surprise", "")]
    write_csv(tmp_path / "24" / "label-disdim.csv", "name,discrete,valence", "s2,hapy,0")
    with pytest.raises(InputError, match=r"label-disdim\.csv:2: field 'discrete': expected one of neutral, angry"):
        clips_of("mer2024", tmp_path / "24")


@pytest.mark.parametrize(
    ("name", "table"), [("cmu-mosi", "label.csv"), ("cmu-mosei", "label.csv"), ("simsv2", "meta.csv")]
)
def test_sentiment_tables(tmp_path, name, table):
    header = "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"
    lines = ["v,1,Good,1.2,,,,Positive,train", "v,0002,Bad,-0.4,,,,Negative,valid", "w,1,So,0,,,,Neutral,test"]
    write_csv(tmp_path / table, header, *lines)
    touch(tmp_path / "Raw/v/0001.mp4", tmp_path / "Raw/v/0002.mp4")
    clips = clips_of(name, tmp_path)
    assert short(clips) == [
        ("v_1", "train", "positive", "Good"),
        ("v_0002", "validation", "negative", "Bad"),
        ("w_1", "test", "neutral", "So"),
    ]
    assert [c.video.is_file() for c in clips] == [True, True, False], "padded to four digits or not"
    for label in ("nan", "inf", "great"):
        write_csv(tmp_path / table, "video_id,clip_id,text,label,mode", f"v,1,x,{label},train")
        with pytest.raises(InputError, match=rf"{table}:2: field 'label': expected a number; found '{label}'"):
            clips_of(name, tmp_path)
    write_csv(tmp_path / table, "video_id,clip_id,text,label,mode", "v,1,well, yes,1,train")
    with pytest.raises(InputError, match=rf"{table}:2: expected 5 cells, as the header has; found 6"):
        clips_of(name, tmp_path)


def test_first_release_of_sims(tmp_path):
    home = tmp_path / "metadata"
    write_csv(home / "sentiment/label_M.csv", "video_id,clip_id,label", "v,1,0.8", "v,2,-0.2", "w,1,0.0")
    for split, index in (("train", "2"), ("val", "0"), ("test", "1")):
        write_csv(home / f"{split}_index.csv", "index", index)
    write_csv(home / "Translation.csv", "video_id,clip_id,Chinese,English", "v,1,hao,good")
    touch(tmp_path / "Raw/v/0001.mp4")
    clips = clips_of("sims", tmp_path)
    assert short(clips) == [
        ("w_1", "train", "neutral", ""),
        ("v_1", "validation", "positive", "hao"),
        ("v_2", "test", "negative", ""),
    ]
    assert clips[1].video.is_file()
    write_csv(home / "test_index.csv", "index", "3")
    with pytest.raises(InputError, match=r"test_index\.csv:2: field 'index': expected a row of label_M\.csv, 0 to 2"):
        clips_of("sims", tmp_path)


def test_ovmerd(tmp_path):
    write_csv(tmp_path / "ovlabel.csv", "name,openset", "p1,\"['happy', 'moved']\"", "p2,")
    write_csv(tmp_path / "subtitle_eng.csv", "name,sentence", "p1,Thank you")
    write_csv(tmp_path / "track2_train_ovmerd.csv", "name,openset", 't1,"[worried, tense]"')
    write_csv(tmp_path / "track3_train_ovmerd.csv", "name,reason", 't1,"He frowns, so he is tense."')
    write_csv(tmp_path / "subtitle_chieng.csv", "name,chinese,english", "t1,bu,No")
    touch(tmp_path / "video/p1.mp4", tmp_path / "audio/p1.wav")
    clips = clips_of("ov-merd", tmp_path)
    assert short(clips) == [
        ("t1", "train", "worried, tense", "No"),
        ("p1", "test", "happy, moved", "Thank you"),
        ("p2", "test", None, ""),
    ]
    assert clips[0].rationale == "He frowns, so he is tense." and clips[1].audio.is_file() and clips[0].audio is None


def test_mc_eiu(tmp_path):
    header = "video_id,Subtitle,emotion,intent,mode"
    lines = ["d0_0,Why?,Surprise,questioning,train", "d0_1,Good,happy,agreeing,validation"]
    write_csv(tmp_path / "MC-EIU_label.csv", header, *lines)
    touch(tmp_path / "video/d0_0.mkv", tmp_path / "video/d0_1.mp4")
    assert short(clips_of("mc-eiu", tmp_path)) == [
        ("d0_0", "train", "surprise", "Why?"),
        ("d0_1", "validation", "happy", "Good"),
    ]
    intents = clips_of("mc-eiu-intent", tmp_path)
    assert [c.label for c in intents] == ["questioning", "agreeing"] and all(c.video.is_file() for c in intents)


def test_mafw(tmp_path):
    home = tmp_path / "Train & Test Set/single"
    for fold in (1, 2):
        for split in ("train", "test"):
            folder = home / f"no_caption/set_{fold}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}.txt").write_text(f"0000{fold}.mp4 anger\n00009.mp4 neutral\n")
    captions = home / "with_caption/set_2"
    captions.mkdir(parents=True)
    captions.joinpath("train.txt").write_bytes(b"00002.mp4\tanger\t\xb0\xa1\xff\tThe brows are lowered.\n")
    touch(tmp_path / "data/clips/00002.mp4")
    clips = clips_of("mafw", tmp_path, fold=2)
    assert short(clips) == [
        (n, s, e, "") for s in ("train", "test") for n, e in (("00002", "anger"), ("00009", "neutral"))
    ]
    assert clips[0].rationale == "The brows are lowered." and clips[1].rationale == "" and clips[0].video.is_file()
    with pytest.raises(InputError, match="field '--fold': expected a fold from 1 to 5; found 6"):
        clips_of("mafw", tmp_path, fold=6)
    (home / "no_caption/set_1/test.txt").write_text("00001.mp4 anger\n00002.mp4 rage\n")
    with pytest.raises(InputError, match=r"test\.txt:2: expected CLIP\.mp4 and one of anger.*found '00002.mp4 rage'"):
        clips_of("mafw", tmp_path)


@pytest.mark.parametrize(
    ("name", "corpora", "subtitles", "first"),
    [
        ("meld", {"train": {"t": {"emo": 1}}, "val": {"v": {"emo": 0}}, "test": {"u": {"emo": 6}}}, "english", "joy"),
        ("sims", {"train": {"t": {"val": -0.5}}, "test": {"u": {"val": 0.0}}}, "chinese", "negative"),
        ("mer2023", {"train": {"t": {"emo": "sad"}}, "test1": {"u": {"emo": "angry"}}}, "chinese", "sad"),
    ],
)
def test_preprocessed_folders_of_the_benchmark(tmp_path, name, corpora, subtitles, first):
    arrays = {f"{split}_corpus": np.array(clips, dtype=object) for split, clips in corpora.items()}
    label = "label-6way.npz" if name.startswith("mer") else "label.npz"
    np.savez_compressed(tmp_path / label, **arrays)
    write_csv(tmp_path / "transcription-engchi-polish.csv", f"name,{subtitles}", "t,words")
    folder = "subvideo" if name == "meld" else "video"
    touch(tmp_path / folder / "t.mp4", tmp_path / folder.replace("video", "audio") / "t.wav")
    clips = clips_of(name, tmp_path)
    splits = [{"val": "validation", "test1": "test"}.get(split, split) for split in corpora]
    assert [c.split for c in clips] == splits
    assert short(clips)[0] == ("t", "train", first, "words")
    assert clips[0].video.is_file() and clips[0].audio.is_file() and clips[-1].audio is None


def test_preprocessed_iemocap_is_split_by_session(tmp_path):
    corpus = {f"Ses0{n}F_impro01_F000": {"emo": n - 2} for n in (2, 5)}
    write_corpus(tmp_path / "label_4way.npz", "whole_corpus", corpus)
    write_csv(tmp_path / "transcription-engchi-polish.csv", "name,english", "x,y")
    with pytest.raises(InputError, match="expected clips of session 1"):
        clips_of("iemocap", tmp_path)
    corpus |= {f"Ses0{n}F_impro01_F000": {"emo": 0} for n in (1, 3, 4)}
    write_corpus(tmp_path / "label_4way.npz", "whole_corpus", corpus)
    clips = clips_of("iemocap", tmp_path)
    assert [c.split for c in clips] == ["train"] * 4 + ["test"] and clips[-1].label == "anger"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_wrong_folder_is_named(tmp_path, name):
    with pytest.raises(InputError) as error:
        clips_of(name, tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def lines(path):
    return [json.loads(line) for line in path.open()]


def test_rows_have_the_documented_form(tmp_path, capsys):
    meld(tmp_path / "meld")
    out = tmp_path / "rows.jsonl"
    command = ["meld", "--root", str(tmp_path / "meld"), "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "MELD, train: 3 clips (surprise 1, joy 1, neutral 1)" in said and "missing files: 1\n" in said
    assert "dia1_utt0.mp4" in said and not out.exists()
    assert main(command) == 2
    assert "dia1_utt0.mp4: field 'train_dia1_utt0': expected an existing file" in capsys.readouterr().err
    assert not out.exists(), "nothing is written before everything is checked"
    assert main([*command, "--skip-missing", "--context", "1"]) == 0
    assert "rows.jsonl: 2 rows, 1 skipped" in capsys.readouterr().out
    first, second = lines(out)
    video = str(tmp_path / "meld/train_splits/dia0_utt1.mp4")
    options = "anger, disgust, fear, joy, neutral, sadness, surprise"
    task = f"Which emotion does the speaker show? Answer with one of: {options}."
    assert second == {
        "id": "train_dia0_utt1",
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": video},
                    {"type": "audio", "audio": video},  # the video's own track
                    {"type": "text", "text": f"Before this clip was said:\nJoey: None, really?\n\n{task}"},
                ],
            }
        ],
        "subtitle": "Sure.",
        "label": "joy",
    }
    assert first["prompt"][0]["content"][-1]["text"] == task


def test_rows_pass_the_reader(tmp_path):
    """With sound and words only, which every reader of rows takes; label and rationale come through."""
    iemocap(tmp_path / "iemocap")
    for path in (tmp_path / "iemocap").rglob("*_F000.wav"):
        write_wav(path, tone(16000, 300, 0.1))
    out = tmp_path / "rows.jsonl"
    words = ["iemocap", "--root", str(tmp_path / "iemocap"), "--out", str(out), "--skip-missing"]
    assert main([*words, "--media", "audio,text", "--split", "test"]) == 0
    (example,) = read_examples(out, DataConfig(labels=["happy", "sad", "neutral", "anger"]), held_out=True)
    assert (example.id, example.label, example.subtitle) == ("Ses05F_impro01_F000", "neutral", "Excuse me.")
    assert [part["type"] for part in example.messages[0]["content"]] == ["audio", "text"]
    assert main([*words, "--media", "video", "--split", "all", "--question", "How?"]) == 0
    (part,) = lines(out)[0]["prompt"][0]["content"]
    assert part["text"].startswith("How? Answer with one of: happy, sad") and "subtitle" not in lines(out)[0]


def test_rationales_and_open_labels(tmp_path):
    write_csv(tmp_path / "track2_train_ovmerd.csv", "name,openset", "t1,[worried]", "t2,[]")
    write_csv(tmp_path / "track3_train_ovmerd.csv", "name,reason", "t1,He frowns.")
    touch(tmp_path / "video/t1.mp4")
    out = tmp_path / "rows.jsonl"
    assert main(["ov-merd", "--root", str(tmp_path), "--out", str(out)]) == 0
    (row,) = lines(out)
    assert (row["rationale"], row["label"]) == ("He frowns.", "worried")
    text = row["prompt"][0]["content"][-1]["text"]
    assert text == "Please recognize all possible emotional states of the character."


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--media", "video,smell"], "expected some of video, audio, text"),
        (["--out", "rows.csv"], "field '--out': expected a .jsonl file in an existing folder"),
        (["--split", "validation", "--root", "gone"], "gone: field '--root': expected an existing folder"),
    ],
)
def test_mistakes_of_the_command(tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    meld(tmp_path / "meld")
    assert main(["meld", "--root", "meld", "--out", "rows.jsonl", "--skip-missing", *extra]) == 2
    assert message in capsys.readouterr().err


def test_a_clip_twice_is_refused(tmp_path, capsys):
    write_csv(tmp_path / "label.csv", "video_id,clip_id,text,label,mode", "v,1,a,1,train", "v,1,b,1,train")
    touch(tmp_path / "Raw/v/1.mp4")
    assert main(["cmu-mosi", "--root", str(tmp_path), "--out", str(tmp_path / "r.jsonl")]) == 2
    assert "expected every clip once; found 'v_1' twice" in capsys.readouterr().err


def test_the_last_turns_are_the_context(tmp_path):
    header = "Dialogue_id\tUtterance_id\tText\tLabel"
    for split in ("train", "dev", "test"):
        write_csv(tmp_path / f"{split}.tsv", header, *(f"0\t{n}\tturn {n}\tAgree" for n in range(4)))
    touch(*(tmp_path / f"video/dia0_utt{n}.mp4" for n in range(4)))
    out = tmp_path / "rows.jsonl"
    assert main(["mintrec2", "--root", str(tmp_path), "--out", str(out), "--context", "2"]) == 0
    texts = [row["prompt"][0]["content"][-1]["text"] for row in lines(out)]
    assert texts[3].startswith("Before this clip was said:\nSomeone: turn 1\nSomeone: turn 2\n\nWhat is the intent")
    assert texts[0].startswith("What is the intent")
