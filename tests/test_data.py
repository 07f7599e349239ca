"""Rows in, examples out; every bad row named by file, line and field; the order of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opsd.config import DataConfig
from opsd.data import Example, order, read_examples
from opsd.errors import InputError, InputErrors

LABELS = DataConfig(labels=("happy", "sad"))
ROW: dict[str, Any] = {
    "id": "a",
    "prompt": "How does she feel?",
    "rationale": "She smiles.",
    "label": "happy",
}


def write(folder: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def refusal(folder: Path, *rows: dict[str, Any] | str | bytes, config: DataConfig = LABELS) -> str:
    with pytest.raises(InputError) as caught:
        read_examples(write(folder, *rows), config)
    return str(caught.value).replace(f"{folder}/", "")


def chat(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return ROW | {"prompt": [{"role": role, "content": list(parts)}]}


def test_a_text_prompt_becomes_one_user_message(tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path, ROW | {"subtitle": "Great.", "answer": "joy"}), LABELS)
    assert example == Example(
        id="a",
        messages=[{"role": "user", "content": [{"type": "text", "text": "How does she feel?"}]}],
        rationale="She smiles.",
        label="happy",
        answer="joy",
        subtitle="Great.",
        teacher_media=(),
        file=tmp_path / "rows.jsonl",
        line=1,
    )


def test_media_are_relative_to_the_file_and_listed_in_order(tmp_path: Path) -> None:
    for name in ("face.png", "voice.wav", "late.png", "clip.mp4"):
        (tmp_path / name).touch()
    row = chat(
        {"type": "image", "image": "face.png"},
        {"type": "text", "text": "?"},
        {"type": "audio", "audio": "./voice.wav"},
        {"type": "video", "video": "clip.mp4"},
        {"type": "audio", "audio": "clip.mp4"},
    )
    row["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    late = [{"type": "image", "image": "late.png"}, {"type": "audio", "audio": "voice.wav"}]
    (example,) = read_examples(write(tmp_path, row | {"teacher_media": late}), LABELS)
    assert list(example.media()) == [
        ("prompt[1].content[0].image", "image", tmp_path / "face.png"),
        ("prompt[1].content[2].audio", "audio", tmp_path / "voice.wav"),
        ("prompt[1].content[3].video", "video", tmp_path / "clip.mp4"),
        ("prompt[1].content[4].audio", "audio", tmp_path / "clip.mp4"),
        ("teacher_media[0].image", "image", tmp_path / "late.png"),
        ("teacher_media[1].audio", "audio", tmp_path / "voice.wav"),
    ]
    assert example.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    (short,) = read_examples(write(tmp_path, row | {"teacher_images": ["late.png"]}), LABELS)
    assert short.teacher_media == example.teacher_media[:1]


def test_the_alias_blank_lines_a_bom_and_number_ids_are_fine(tmp_path: Path) -> None:
    row = {"id": 7, "prompt": "?", "privileged_context": "Tears.", "subtitle": "", "label": None}
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(row).encode(), "", "   ", ROW)
    first, second = read_examples(path, LABELS)
    assert (first.id, first.rationale, first.subtitle, first.label, first.line) == (
        "7",
        "Tears.",
        None,
        None,
        1,
    )
    assert second.line == 4


def test_held_out_rows_need_no_rationale(tmp_path: Path) -> None:
    row = {name: value for name, value in ROW.items() if name != "rationale"}
    path = write(tmp_path, row)
    assert read_examples(path, LABELS, held_out=True)[0].rationale is None
    assert read_examples(path, DataConfig(require_rationale=False))[0].rationale is None
    assert "rows.jsonl:1: field 'rationale': expected text that is not empty; found nothing" in refusal(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "{'id': 1}",
            ": expected one JSON object on the line; found Expecting property name",
        ),
        (
            "[1]",
            ": expected one JSON object on the line; found a list",
        ),
        (
            '{"id": "a", "id": "b"}',
            ": expected one JSON object on the line; found the key 'id' twice",
        ),
        (
            b'{"id": "\xff"}',
            ": expected UTF-8 text; found bytes that are not UTF-8",
        ),
        (
            ROW | {"id": None},
            ": field 'id': expected text; found nothing",
        ),
        (
            ROW | {"prompt": None},
            ": field 'prompt': expected text; found nothing",
        ),
        (
            ROW | {"prompt": 3},
            ": field 'prompt': expected text; found the number 3",
        ),
        (
            ROW | {"prompt": "  "},
            ": field 'prompt': expected text that is not empty; found '  '",
        ),
        (
            ROW | {"prompt": []},
            ": field 'prompt': expected chat messages that end with the user's; found no messages",
        ),
        (
            ROW | {"prompt": ["?"]},
            ": field 'prompt[0]': expected a message with role and content; found text",
        ),
        (
            ROW | {"prompt": [{"role": "user"}]},
            ": field 'prompt[0]': expected a message with role and content; found keys role",
        ),
        (
            chat(),
            ": field 'prompt[0].content': expected at least one part; found none",
        ),
        (
            chat({"type": "text", "text": "?"}, role="usr"),
            ": field 'prompt[0].role': expected one of system, user, assistant; found 'usr' (did you mean 'user'?)",
        ),
        (
            chat({"type": "text", "text": "?"}, role="assistant"),
            ": field 'prompt': expected chat messages that end with the user's; found 'assistant' last",
        ),
        (
            chat("?"),
            ": field 'prompt[0].content[0]': expected a part whose type is one of text, image, video, "
            "audio; found text",
        ),
        (
            chat({"type": "image", "path": "a.png"}),
            ": field 'prompt[0].content[0]': expected the keys type and image; found keys type, path",
        ),
        (
            chat({"type": "image", "image": "https://x.org/a.png"}),
            ": field 'prompt[0].content[0].image': expected the path of a local file; found 'https://x.org/a.png'",
        ),
        (
            chat({"type": "image", "image": "no.png"}),
            ": field 'prompt[0].content[0].image': expected an existing file; found no file at no.png",
        ),
        (
            chat({"type": "audio", "audio": "no.wav"}),
            ": field 'prompt[0].content[0].audio': expected an existing file; found no file at no.wav",
        ),
        (
            ROW | {"rationale": ""},
            ": field 'rationale': expected text that is not empty; found ''",
        ),
        (
            ROW | {"rationale": " \n"},
            ": field 'rationale': expected text that is not empty; found ' \\n'",
        ),
        (
            ROW | {"rationale": ["x"]},
            ": field 'rationale': expected text; found a list",
        ),
        (
            ROW | {"privileged_context": "x"},
            ": field 'privileged_context': expected one of rationale, privileged_context; found both",
        ),
        (
            ROW | {"label": "hapy"},
            ": field 'label': expected one of happy, sad; found 'hapy' (did you mean 'happy'?)",
        ),
        (
            ROW | {"label": True},
            ": field 'label': expected text; found true or false",
        ),
        (
            ROW | {"subtitle": "\ud800"},
            ": field 'subtitle': expected text in valid Unicode; found half of a surrogate pair",
        ),
        (
            ROW | {"teacher_media": "a.png"},
            ": field 'teacher_media': expected a list of parts; found text",
        ),
        (
            ROW | {"teacher_media": [{"type": "text", "text": "psst"}]},
            ": field 'teacher_media[0]': expected a part whose type is one of image, video, audio; found type 'text'",
        ),
        (
            ROW | {"teacher_media": [{"type": "audio", "audio": "a.wav"}]},
            ": field 'teacher_media[0].audio': expected an existing file; found no file at ",
        ),
        (
            ROW | {"teacher_images": "a.png"},
            ": field 'teacher_images': expected a list of paths; found text",
        ),
        (
            ROW | {"teacher_images": [3]},
            ": field 'teacher_images[0]': expected text; found the number 3",
        ),
        (
            ROW | {"teacher_images": [], "teacher_media": []},
            ": field 'teacher_images': expected one of teacher_media, teacher_images; found both",
        ),
        (
            ROW | {"rationals": "x"},
            ": field 'rationals': expected a known field, one of id, prompt, rationale, "
            "privileged_context, label, answer, subtitle, teacher_media, teacher_images; found an unknown field "
            "(did you mean 'rationale'?)",
        ),
        (
            ROW | {"id": "first"},
            ": field 'id': expected an id of its own; found 'first' again, first on line 1",
        ),
    ],
)
def test_a_bad_row_is_one_line_with_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    found = refusal(tmp_path, ROW | {"id": "first"}, row)
    assert found.startswith("rows.jsonl:2" + message)
    assert "\n" not in found


def test_many_problems_come_in_one_message_and_the_list_ends(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "?"} for i in range(14)] + [ROW | {"label": "x", "rationale": ""}]
    with pytest.raises(InputErrors) as caught:
        read_examples(write(tmp_path, *rows), LABELS)
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 16
    assert len(lines) == 11
    assert lines[-1] == "... and 6 more"
    assert [problem.line for problem in caught.value.problems[-2:]] == [15, 15]


def test_an_empty_dataset_and_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", " ") == "rows.jsonl: expected at least one row; found an empty dataset"
    with pytest.raises(
        InputError, match=r"none\.jsonl: expected a readable JSONL file; found No such file or directory"
    ):
        read_examples(tmp_path / "none.jsonl", LABELS)
    with pytest.raises(InputError, match=r"rows\.parquet: expected a \.jsonl file; found 'rows\.parquet'"):
        read_examples(tmp_path / "rows.parquet", LABELS)


@pytest.mark.parametrize(("n_rows", "rows_per_step"), [(10, 4), (4, 4), (3, 8), (1, 1)])
def test_every_epoch_is_a_permutation_of_all_rows(n_rows: int, rows_per_step: int) -> None:
    steps = 5 * n_rows
    seen = [row for step in range(steps) for row in order(n_rows, rows_per_step, step, seed=0)]
    assert len(seen) == steps * rows_per_step
    for start in range(0, len(seen) - n_rows + 1, n_rows):
        assert sorted(seen[start : start + n_rows]) == list(range(n_rows))


def test_the_order_is_a_pure_function_of_seed_and_step() -> None:
    forwards = [order(100, 7, step, seed=3) for step in range(50)]
    backwards = [order(100, 7, step, seed=3) for step in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != [order(100, 7, step, seed=4) for step in range(50)]
    first, second = ([row for s in range(e, e + 10) for row in order(100, 10, s, seed=3)] for e in (0, 10))
    assert first != second
    assert sorted(first) == sorted(second)
    assert order(5, 5, 0, seed=0) == [1, 4, 0, 3, 2]  # on every machine: a run resumed elsewhere goes on


def test_the_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected n_rows >= 1"):
        order(0, 1, 0, 0)
