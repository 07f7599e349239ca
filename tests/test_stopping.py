"""Stop strings: the first token that completes one, as if everything were decoded after every token."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from opsd.affect.tiny import build_tokenizer
from opsd.data import read_examples
from opsd.loading import load_model
from opsd.prompts import PromptBuilder
from opsd.responses import Responses
from opsd.rollout import decode, rollout
from opsd.sampling import Sampling
from opsd.stopping import StopStrings
from tests.jobs import text_job

TEXT = "the cat sat on the mat. </answer> na\u00efve caf\u00e9 \u4e2d\u6587\u5b57\u7b26 \U0001f600 don't stop, now ! "


def byte_level() -> Any:
    """As Llama 3 and Qwen: tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    backend.train_from_iterator([TEXT * 9], trainer)
    return wrapped(backend)


def byte_fallback() -> Any:
    """As Llama 2 and Gemma: pieces with spaces in them, unknown characters as bytes, one leading space dropped."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["<end>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", "\u2581the", "\u2581cat", "at", "s", "</", "answer", ">", ".", "\u4e2d", "c", "\u2581s", "e"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(backend)


def word_pieces() -> Any:
    """As BERT: joined with spaces that are cleaned up before punctuation, so that text can shrink."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["<end>", "the", "cat", "##s", "do", "n", "'", "t", "n't", ".", ",", "!", "'s", "a", "##at", "?"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<end>"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    return wrapped(backend, clean_up_tokenization_spaces=True)


def wrapped(backend: Any, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **options)


def embedded() -> Any:
    return build_tokenizer([TEXT])


def naive(tokenizer: Any, tokens: list[int], stop: tuple[str, ...]) -> int | None:
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n], skip_special_tokens=True)
        if any(string in text for string in stop):
            return n
    return None


def likely_tokens(tokenizer: Any, draw: random.Random, n: int) -> list[int]:
    """Real characters and words, and now and then a byte that makes no sense."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if "<0x00>" in names:
        runs = [[names.index(f"<0x{b:02X}>") for b in c.encode()] for c in "\u4e2d\u00e9a<"]
        runs += [[i] for i, name in enumerate(names) if i and not name.startswith("<0x")]
    else:
        runs = [tokenizer.encode(word, add_special_tokens=False) for word in TEXT.split()]
    tokens: list[int] = []
    while len(tokens) < n:
        tokens += draw.choice(runs) if draw.random() < 0.8 else [draw.randrange(len(tokenizer))]
    return tokens[:n]


@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_pieces, embedded])
def test_equal_to_decoding_everything_after_every_token(make):
    tokenizer, draw, found = make(), random.Random(0), 0
    for _ in range(200):
        tokens = likely_tokens(tokenizer, draw, draw.randrange(1, 120))
        text = tokenizer.decode(tokens, skip_special_tokens=True) or "x"
        at = [draw.randrange(len(text)) for _ in range(2)]
        stop = tuple(s for s in (text[i : i + draw.randrange(1, 9)] for i in at) if s and "\ufffd" not in s)
        want = naive(tokenizer, tokens, stop)
        stops, seen = StopStrings(tokenizer, stop), 0
        while (got := stops.first(tokens[:seen], max(0, seen - 7))) is None and seen < len(tokens):
            seen = min(len(tokens), seen + 7)
        assert got == want, (tokens, stop)
        found += want is not None
    assert found > 100


def test_a_string_that_spans_many_tokens_or_ends_inside_one():
    tokenizer = byte_level()
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "</answer>"]
    [joined] = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "the"][:1]
    assert StopStrings(tokenizer, ("</answer>",)).first([5, 6, *spelled, 7], 0) == 11
    assert StopStrings(tokenizer, ("h",)).first([joined], 0) == 1
    assert StopStrings(tokenizer, ()).first(spelled, 0) is None


def test_decoding_does_not_begin_inside_a_character():
    tokenizer = byte_fallback()
    tokens = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in ("\u4e2d" * 10 + "a<").encode()]
    assert StopStrings(tokenizer, ("a<",)).first(tokens, 0) == naive(tokenizer, tokens, ("a<",)) == 32


def test_old_tokens_are_not_decoded_again():
    class Counting:
        decoded = 0

        def decode(self, tokens: list[int], **_: Any) -> str:
            self.decoded += len(tokens)
            return "".join(chr(97 + token) for token in tokens)

    tokenizer = Counting()
    stops = StopStrings(tokenizer, ("zz",))
    for n in range(1, 2001):
        assert stops.first([i % 20 for i in range(n)], n - 1) is None
    assert tokenizer.decoded < 2000 * 10


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = text_job(tmp_path_factory.mktemp("stopping"))
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    return model, [builder.student(e) for e in read_examples(config.data.train, config.data)]


@pytest.mark.parametrize("slots, share_prefix", [(3, True), (64, True), (64, False)])
def test_responses_end_where_their_text_first_contains_a_stop_string(setting, slots, share_prefix):
    model, prompts = setting
    seeds, stop = list(range(len(prompts))), ("voice", "d f", "> the")
    whole = rollout(model, prompts, Sampling(4, 40), seeds)
    got = rollout(model, prompts, Sampling(4, 40, stop=stop), seeds, slots=slots, share_prefix=share_prefix)
    ends = [naive(model.tokenizer, row[:n], stop) for row, n in zip(whole.tokens.tolist(), whole.lengths, strict=True)]
    assert {end is None for end in ends} == {True, False}
    for i, (end, n) in enumerate(zip(ends, whole.lengths, strict=True)):
        length = end or n
        assert got.lengths[i] == length
        assert got.tokens[i, :length].tolist() == whole.tokens[i, :length].tolist()
        assert (got.tokens[i, length:] == model.pad_id).all() and not got.logprobs[i, length:].any()
    stopped = [text for text, end in zip(decode(model.tokenizer, got), ends, strict=True) if end]
    assert all(any(string in text for string in stop) for text in stopped)


def test_a_response_that_stops_while_its_neighbours_go_on_stays_as_it_is(setting):
    """Its slot is idle, too few are to be dropped, and steps go on over it."""
    model, prompts = setting
    sampling, seeds = Sampling(4, 40), list(range(len(prompts)))
    model_ends, model.end_ids = model.end_ids, [-1]  # all the others go on
    try:
        whole = rollout(model, prompts, sampling, seeds)
        texts = decode(model.tokenizer, whole)
        pairs = [" ".join(text.split()[i : i + 3]) for text in texts for i in range(8)]
        (rare, *_) = [pair for pair in pairs if sum(pair in text for text in texts) == 1]
        got = rollout(model, prompts, replace(sampling, stop=(rare,)), seeds)
    finally:
        model.end_ids = model_ends
    (one,) = [i for i, text in enumerate(texts) if rare in text]
    assert got.lengths[one] < 16 and set(got.lengths) == {40, got.lengths[one]}
    assert (got.tokens[one, got.lengths[one] :] == model.pad_id).all()
    for tokens, plain, n in zip(got.tokens, whole.tokens, got.lengths, strict=True):
        assert tokens[:n].tolist() == plain[:n].tolist()


def test_a_stopped_response_is_not_truncated(tmp_path):
    from opsd.opening import open_run
    from opsd.step import sample

    config = text_job(tmp_path, "rollout.stop=[voice, face]", "rollout.max_new_tokens=30")
    with open_run(config) as run:
        group = sample(run, read_examples(config.data.train, config.data)[:4], step=0)
    responses: Responses = group.responses
    last = responses.tokens[torch.arange(len(responses.lengths)), torch.tensor(responses.lengths) - 1].tolist()
    stopped = sum("voice" in text or "face" in text for text in group.texts)
    ended = sum(token in run.model.end_ids for token in last)
    assert stopped > 0
    assert group.scores["truncated"] == len(last) - stopped - ended
