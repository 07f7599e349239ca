"""The scores against an implementation of their definitions that shares no line with ours."""

from __future__ import annotations

import math
import random
import re
from functools import cache

import numpy as np
import pytest

from opsd.affect.unibench import metrics
from opsd.affect.unibench.labels import parse_labels, parse_sentiment
from opsd.affect.unibench.wheels import load_wheels
from tests.affect.wheel_files import FORMATS, SYNONYMS, WHEELS, write_wheels

NEUTRAL = "neutral"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return load_wheels(write_wheels(tmp_path_factory.mktemp("wheels")))


# --- the definitions, from the tables as Python data and with numpy ---


def plain_list(value):
    if isinstance(value, float) or value is None:
        return []
    if isinstance(value, np.ndarray):
        value = list(value)
    if isinstance(value, list):
        return [x.lower().strip() for x in value]
    if value.startswith("["):
        value = value[1:]
    if value[-1:] == "]":
        value = value[:-1]
    return [x.strip().lower() for x in re.findall(r"[^'\",]+", value) if x.strip()]


def plain_wheel(rows):
    """Every (word, level 1) in the order in which the branches are first met; the last one of a word wins."""
    filled, last = [], (None, None, None)
    for row in rows:
        last = tuple(a if a is not None else b for a, b in zip(row, last, strict=True))
        filled.append(tuple(cell.lower().strip() for cell in last))
    group = {}
    for one in dict.fromkeys(r[0] for r in filled):
        group[one] = one
        for two in dict.fromkeys(r[1] for r in filled if r[0] == one):
            group[two] = one
            for r in filled:
                if r[:2] == (one, two):
                    group[r[2]] = one
    return group


PLAIN_WHEELS = [plain_wheel(rows) for rows in WHEELS]


@cache
def plain_group(word, wheel):
    reached = []
    for base, forms in FORMATS.items():
        if word == base or word in [f.strip() for f in forms.split(",") if f]:
            reached += [
                raw for raw, runs in SYNONYMS.items() if base == raw or any(base in plain_list(r) for r in runs)
            ]
    inside = sorted(raw for raw in reached if raw in PLAIN_WHEELS[wheel])
    return PLAIN_WHEELS[wheel][inside[0]] if inside else None


def plain_set(value, wheel):
    return {plain_group(word, wheel) for word in plain_list(value)} - {None}


def plain_scores(truths, predictions, space):
    hits, ms, fs = [], [], []
    for wheel in range(5):
        pairs = [(plain_set(g, wheel), plain_set(p, wheel)) for g, p in zip(truths, predictions, strict=True)]
        pairs = [(g, p) for g, p in pairs if g]
        inside = {plain_group(label, wheel) for label in space} - {None}
        hits.append(np.mean([len(g & p) for g, p in pairs]))
        ms.append(np.mean([len(g & p) / len(p & inside) if p & inside else 0 for g, p in pairs]))
        p_mean = np.mean([len(g & p) / len(p) if p else 0 for g, p in pairs])
        r_mean = np.mean([len(g & p) / len(g) for g, p in pairs])
        fs.append(2 * p_mean * r_mean / (p_mean + r_mean) if p_mean + r_mean else 0)
    return np.mean(hits), np.mean(ms), np.mean(fs)


def plain_waf(truth, prediction):
    keep = np.array(truth) != 0
    t, p = np.array(truth)[keep] > 0, np.array(prediction)[keep] > 0
    score = 0.0
    for side in (True, False):
        right, said, true = np.sum((t == side) & (p == side)), np.sum(p == side), np.sum(t == side)
        score += true / len(t) * (2 * right / (said + true) if said + true else 0)
    return score


# --- random lists of every shape a file can hold ---

KNOWN = sorted({f for base, forms in FORMATS.items() for f in (base, *forms.split(",")) if f})
STRANGE = ["zest", "Happy", "SAD", " glad ", "JOYS", NEUTRAL, "positive", "happy sad", "[happy", ""]


def random_value(draw):
    words = [draw.choice(KNOWN) if draw.random() < 0.75 else draw.choice(STRANGE) for _ in range(draw.randint(0, 4))]
    forms = [
        lambda: words,
        lambda: np.array(words, dtype=object),
        lambda: f"[{', '.join(words)}]",
        lambda: str(words),
        lambda: ",".join(words),
        lambda: f" [{', '.join(words)}]",
        lambda: "[" + '","'.join(words),
        lambda: draw.choice([math.nan, None, "", "[]", "['']", "[[]]"]),
    ]
    return draw.choice(forms)()


def test_all_scores_equal_their_definitions(wheels):
    draw = random.Random("unibench")
    truths = [random_value(draw) if draw.random() < 0.8 else NEUTRAL for _ in range(1000)]
    predictions = [random_value(draw) for _ in range(1000)]
    space = ["happy", "sad", "anger", "surprise", NEUTRAL]
    columns = metrics.wheel_columns(
        [parse_labels(v) for v in truths], [parse_labels(v) for v in predictions], wheels, label_space=space
    )
    want = plain_scores(truths, predictions, space)
    found = [float(score(columns.sum(0))) for score in (metrics.hit, metrics.m_score, metrics.ew_f1)]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    assert all(0.02 < value < 0.98 for value in want), "scores that could tell a mistake"
    for name, plain in zip(KNOWN + STRANGE, KNOWN + STRANGE, strict=True):
        assert wheels.of(name) == tuple(plain_group(plain, w) for w in range(5)), name


def test_scores_of_one_clip_equal_the_definition(wheels):
    draw = random.Random("one clip")
    for _ in range(200):
        truth, prediction = random_value(draw), random_value(draw)
        columns = metrics.wheel_columns([parse_labels(truth)], [parse_labels(prediction)], wheels)
        per_wheel = []
        for w in range(5):
            g, p = plain_set(truth, w), plain_set(prediction, w)
            if g:
                per_wheel.append(2 * len(g & p) / (len(g) + len(p)) if g & p else 0)
        (found,) = metrics.sample_ew_f1(columns)
        assert (found is None) == (not per_wheel)
        assert found is None or math.isclose(found, np.mean(per_wheel), abs_tol=1e-12)


def test_waf_equals_its_definition():
    draw = random.Random("waf")
    said = ["positive", "negative", "neutral", "Positive", "", "unknown", 1.0, math.nan]
    for size in (1, 2, 5, 1000):
        truth = [draw.choice([-3.0, -0.2, 0.0, 0.0, 0.4, 2.0]) for _ in range(size - 1)] + [1.0]
        signs = [parse_sentiment(draw.choice(said)) for _ in range(size)]
        found = float(metrics.waf(metrics.sentiment_columns(truth, signs).sum(0)))
        assert math.isclose(found, plain_waf(truth, signs), abs_tol=1e-12)


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ("[happy, sad]", ["happy", "sad"]),
        (" [happy]", ["[happy"]),  # the cut comes before the strip
        ("[[happy]]", ["[happy]"]),  # one bracket each
        (["happy, sad", " Glad "], ["happy, sad", "glad"]),  # elements are not split again
        (np.array(["Happy"]), ["happy"]),
        ("['it''s', \"Sad\"]", ["it", "s", "sad"]),
        ("[", []),
        ("", []),
        (math.nan, []),
        (np.float64("nan"), []),
        (None, []),
        ([], []),
    ],
)
def test_lists_are_read_as_the_official_script_reads_them(value, labels):
    assert parse_labels(value) == labels


@pytest.mark.parametrize(
    ("word", "groups"),
    [
        ("neutral", (None, None, None, None, None)),
        ("fear", ("dark", "joyful", "joyful", "joyful", "happy")),  # its synonym "awed" comes first in the alphabet
        ("surprise", ("jolt", "sudden", "sudden", "quick", None)),
        ("disgust", ("hot", "burning", None, "heavy", None)),
        ("gloomy", ("dark", "low", "burning", None, "sad")),  # in wheel 3 two branches: the last one written
        ("drained", (None, None, "worn", None, None)),  # written last in "worn", although "low" comes back later
        ("awed", (None, "joyful", "joyful", "joyful", "happy")),
        ("downs", ("dark", "low", "low", "heavy", "sad")),  # a form of two base words
        ("upbeat", ("bright", "joyful", "joyful", "joyful", "happy")),
        ("joys", ("bright", "joyful", "joyful", "quick", "happy")),  # calm, then happy
        ("merry", ("bright", "joyful", "worn", "joyful", "happy")),  # drained, then happy
        ("JOYS", ("bright", "joyful", "joyful", "quick", "happy")),
        ("unlisted", (None, None, None, None, None)),
        ("Happy", (None, None, None, None, None)),  # words are lower-cased before they are looked up
    ],
)
def test_where_a_word_falls(wheels, word, groups):
    assert wheels.of(word) == groups


def test_quirks_of_hit(wheels):
    def hit(truth, prediction):
        columns = metrics.wheel_columns([truth], [prediction], wheels, label_space=["happy", "sad"])
        return metrics.hit(columns.sum(0)), metrics.m_score(columns.sum(0)), metrics.sample_hit(columns)[0]

    with np.errstate(all="raise"):
        assert np.isnan(hit([NEUTRAL], ["happy"])[0]), "a neutral clip leaves HIT"
    assert hit([NEUTRAL], ["happy"])[2] is None
    everything = [*KNOWN]
    assert hit(["sad"], everything)[0] == 1, "listing every emotion scores 1"
    assert hit(["sad"], everything)[1] == 0.5, "the m-score divides by the two label groups"
    assert hit(["sad"], ["sad", "cross"])[1] == 1, "an answer outside the label groups costs no m-score"
    assert hit(["sad"], [])[:2] == (0, 0)
    assert np.isnan(hit(["surprise"], ["surprise"])[0]) and hit(["surprise"], ["surprise"])[2] == 1


def test_f_is_zero_where_precision_and_recall_are(wheels):
    columns = metrics.wheel_columns([["happy"]], [["sad"]], wheels)
    assert metrics.ew_f1(columns.sum(0)) == 0 and metrics.sample_ew_f1(columns) == [0]


def test_f_comes_from_mean_precision_and_recall(wheels):
    columns = metrics.wheel_columns([["happy"], ["happy", "sad"]], [["happy", "sad"], ["happy"]], wheels)
    assert metrics.ew_f1(columns.sum(0)) == pytest.approx(0.75), "p = r = 3/4, while the mean of F is 2/3"
    assert metrics.sample_ew_f1(columns) == pytest.approx([2 / 3, 2 / 3])


def test_bootstrap_resamples_clips(wheels):
    truths = [["happy"], ["sad"], ["anger"], ["happy"]] * 25
    columns = metrics.wheel_columns(truths, [["happy"]] * 100, wheels)
    draws = metrics.replicates(columns, metrics.hit, 400, seed=3)
    assert np.array_equal(draws, metrics.replicates(columns, metrics.hit, 400, seed=3))
    assert not np.array_equal(draws, metrics.replicates(columns, metrics.hit, 400, seed=4))
    low, high = metrics.interval(draws)
    error = math.sqrt(0.5 * 0.5 / 100)  # every wheel groups these words alike: a binomial share
    assert low < 0.5 < high and (high - low) == pytest.approx(2 * 1.96 * error, rel=0.15)
    same = metrics.wheel_columns([["happy"]] * 9, [["happily"]] * 9, wheels)
    assert metrics.interval(metrics.replicates(same, metrics.ew_f1, 20, 0)) == (1, 1)
