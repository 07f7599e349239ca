"""Format and accuracy rewards on what a model may write, and on what it may write to be paid."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd.rewards import accuracy, parse_answer, reward, well_formed
from opsd.sections import RewardsConfig

GOOD = "<think>low voice</think><answer>sad</answer>"
# text -> accuracy for the label "sad", format
TEXTS = {
    GOOD: (1, 1),
    "\n<think>\nlow\n</think>\n\n<answer>\n SAD \n</answer>\n": (1, 1),
    "": (0, 0),
    "sad": (0, 0),
    "<think></think><answer>sad</answer>": (1, 0),
    "<think> \n\t</think><answer>sad</answer>": (1, 0),
    "<think>low</think><answer></answer>": (0, 0),
    "<think></think><think>low</think><answer> </answer><answer>sad</answer>": (1, 1),  # empty blocks are none
    "<answer>sad</answer><think>low</think>": (1, 0),
    "<think>low</think><answer>sad": (0, 0),
    "<think>low<answer>sad</answer>": (1, 0),
    "think>low</think><answer>sad</answer>": (1, 0),
    # nested
    "<answer><answer>sad</answer></answer>": (0, 0),
    "<think><think>low</think></think><answer>sad</answer>": (1, 1),
    "<think>low<answer>sad</answer></think>": (1, 0),
    "<think><answer>sad</answer></think><answer>happy</answer>": (1, 0),
    "<think>a</think><answer><think>b</think>sad</answer>": (0, 1),
    "<answer><think>low</think>sad</answer>": (0, 0),
    # repeated: the first counts
    "<think>low</think><answer>happy</answer><answer>sad</answer>": (0, 1),
    "<think>low</think><answer>sad</answer><answer>happy</answer>": (1, 1),
    "<think>low</think><answer>happy, sad</answer>": (0, 1),
    "<think>low</think><answer>sad sad</answer>": (0, 1),
    # look-alikes
    "<think>low</think><answer>s\u0430d</answer>": (0, 1),  # a Cyrillic a
    "<think>low</think><answer>\uff53\uff41\uff44</answer>": (0, 1),  # full width
    "<think>low</think><answer>\u017fad</answer>": (0, 1),  # a long s
    "<think>low</think><answer>sad\u200b</answer>": (0, 1),  # a space of no width
    "<think>low</think>\uff1canswer\uff1esad\uff1c/answer\uff1e": (0, 0),
    "<think>low</think><\u0430nswer>sad</\u0430nswer>": (0, 0),
    "<think>low</think><answer>\u00a0sad\u2003</answer>": (1, 1),  # Unicode's spaces are outer space
    # attributes, other cases, other spellings
    '<think>low</think><answer class="x">sad</answer>': (0, 0),
    "<think>low</think><ANSWER>sad</ANSWER>": (0, 0),
    "<think>low</think>< answer >sad</ answer >": (0, 0),
    '<b title="<think>low</think><answer>sad</answer>">': (1, 1),  # text, not XML
    "<think>low</think>&lt;answer&gt;sad&lt;/answer&gt;": (0, 0),
    "<think>low</think><answer>sad\x00</answer>": (0, 1),
    "<think>low</think><answer>\ud800</answer>": (0, 1),
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:60])
def test_hostile_texts(text):
    assert (accuracy(text, "sad"), well_formed(text)) == TEXTS[text]


def test_labels_are_stripped_and_lower_cased_too_and_none_is_never_right():
    assert accuracy(GOOD, " Sad\n") == 1
    assert accuracy(GOOD, None) == 0 and accuracy("", None) == 0
    assert accuracy("<answer></answer>", "") == 0


def test_one_text_in_two_encodings_is_one_text():
    assert accuracy("<answer>fro\u0308hlich</answer>", "fr\u00f6hlich") == 1
    assert accuracy("<answer>frohlich</answer>", "fr\u00f6hlich") == 0


@pytest.mark.parametrize(
    "piece", ["<answer>", "<think>", "</answer>", "<answer></answer>", "<think>\n", "<", "<answer"]
)
def test_huge_texts(piece):
    """A scan that starts again at every tag would take hours here."""
    text = piece * (8_000_000 // len(piece))
    assert parse_answer(text) is None and well_formed(text) == 0
    assert accuracy(text, "sad") == 0


PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "sad", " ", "\n", "SAD", "<", "é"])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_blocks_are_those_of_the_plain_pattern(text):
    found = [body.strip().lower() for body in re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)]
    assert parse_answer(text) == next(filter(None, found), None)
    spans = {
        name: next((m.span() for m in re.finditer(f"<{name}>(.*?)</{name}>", text, re.DOTALL) if m[1].strip()), None)
        for name in ("think", "answer")
    }
    assert well_formed(text) == (None not in spans.values() and spans["think"][1] <= spans["answer"][0])


def test_the_reward_is_the_weighted_sum():
    class Row:
        label = "sad"

    weights = RewardsConfig(accuracy=2.0, format=0.5)
    assert [reward(text, Row, weights) for text in (GOOD, GOOD.replace("sad", "happy"), "")] == [2.5, 0.5, 0.0]
