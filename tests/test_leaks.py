"""What leaks and, as important, what does not."""

from __future__ import annotations

import json

import pytest

from opsd import leaks
from opsd.leaks import ANSWER, RATIONALE, answer_leaks, names_label, rationale_leaks

EITHER = [
    ("As given, the person is tense.", "as given"),
    ("She is, as labelled, tense.", "as given"),
    ("According to the evidence provided, the brows are low.", "given evidence"),
    ("The provided rationale mentions a tremor.", "given evidence"),
    ("I was given the label.", "given evidence"),
    ("Based on the label one expects tears.", "according to"),
    ("This matches the ground-truth emotion.", "ground truth"),
    ("The gold answer fits.", "ground truth"),
    ("The correct answer must be a negative one.", "correct answer"),
    ("The annotator heard a sigh.", "annotator"),
    ("根据提供的证据, 她很难过。", "标签"),
]
RATIONALES = [
    *EITHER,
    ("The label fits the low voice.", "the label"),
    ("He is labeled as tense.", "the label"),
    ("<think>low</think><answer>sad</answer>", "answer block"),
    ("Hence the emotion is clearly sad.", "states the label"),
    ("Emotion: SAD", "states the label"),
    ("It should be classified as sad.", "states the label"),
]
ANSWERS = [
    *EITHER,
    ("The evidence says that she cries.", "the evidence"),
    ("From this evidence I conclude sadness.", "the evidence"),
    ("The rationale mentions a tremor.", "the rationale"),
    ("The observer noticed tears.", "the observer"),
    ("The label must be sad.", "the label"),
]
CLEAN = [
    "The brows are lowered and the voice trembles; she looks away.",
    'She says "as given in the evidence, the label is sad" and laughs.',
    "“According to the evidence you lied,” he reads aloud.",
    "His mood is, as given away by the shaking voice, tense.",
    "She treats it as given that he left.",
    "As provided on the package, he reads the dose.",
    "There is evidence of tears on both cheeks.",
    "He was given a present and told the news.",
    "She looks like an observer of her own wedding.",
    "The correct tone for a joke; the right side of the mouth lifts.",
    "The ground shakes, the truth is out.",
    "He peels the label on the bottle while he speaks.",
    "The evidence in her voice and the evidence of tears agree.",
    "The rationale behind her anger is the broken promise.",
    "A sad smile, and a happy voice that does not fit.",
    "He was labelled by his friends.",
    "<think>the mouth droops</think><answer>sad</answer>",
    "",
]


@pytest.mark.parametrize(("text", "name"), RATIONALES)
def test_rationales_that_leak(text, name):
    assert name in [leak.name for leak in rationale_leaks(text, "sad")]


@pytest.mark.parametrize(("text", "name"), ANSWERS)
def test_answers_that_leak(text, name):
    assert name in [leak.name for leak in answer_leaks(text)]


@pytest.mark.parametrize("text", CLEAN)
def test_clean_texts_do_not_leak(text):
    assert answer_leaks(text) == []
    assert rationale_leaks(text.replace("<answer>sad</answer>", ""), "sad") == []


def test_every_pattern_has_a_text_that_it_finds():
    assert {name for _, name in RATIONALES} == {*RATIONALE, "states the label"}
    assert {name for _, name in ANSWERS} == set(ANSWER)


def test_a_label_is_a_word_and_not_a_pattern():
    assert rationale_leaks("the emotion is sadly hidden", "sad") == []
    assert rationale_leaks("the emotion is happy", "ha.py") == []
    assert names_label("A Sad smile.", "sad") and not names_label("Sadly not.", "sad")


def test_evidence_is_what_rationales_are_about():
    assert rationale_leaks("The evidence is in the eyes.", "sad") == []


@pytest.fixture
def write(tmp_path):
    def make(*rows):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
        return path

    return make


def test_the_command_counts_and_shows(write, capsys):
    path = write(
        {"id": "a", "prompt": "?", "rationale": "The label is sad.", "label": "sad"},
        {"id": "b", "prompt": "?", "privileged_context": "A sad mouth.", "label": "sad", "answer": "As given, sad."},
        {"id": 3, "response": "The evidence says so.", "answer": "the evidence", "label": None},
        {"id": "d", "prompt": "?", "rationale": "A low voice.", "label": "sad"},
    )
    assert leaks.main([str(path), "--examples", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 rationales leak (33.3%)",
        "  2 name their label in some sense, which is no leak by itself",
        "  the label: 1",
        "  states the label: 1",
        "  line 1, a: 'The label', 'label is sad'",
        "2 of 2 answers leak (100.0%)",
        "  as given: 1",
        "  the evidence: 1",
        "  line 2, b: 'As given'",
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": "a"}], "expected rationale, response or answer in its lines; found none of them"),
        ([{"id": "a", "rationale": "x"}, "{"], "texts.jsonl:2: expected one JSON object on the line"),
        (["[1]"], "texts.jsonl:1: expected one JSON object on the line; found list"),
    ],
)
def test_what_is_no_file_of_texts_is_refused(write, capsys, rows, said):
    assert leaks.main([str(write(*rows))]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert leaks.main([str(tmp_path / "gone.jsonl")]) == 2
    assert "gone.jsonl: expected a readable JSONL file" in capsys.readouterr().err
