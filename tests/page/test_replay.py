"""What the page says of tokens, against a dense definition in fp64 with plain transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.data import read_examples
from opsd.page.replay import replay, top_tokens
from opsd.page.tokens import name, pieces
from opsd.prompts import PromptBuilder
from opsd.rewards import accuracy
from opsd.shelf import Shelf
from opsd.train import train
from opsd_kernels import Head
from tests.jobs import text_job


def trained(folder, *words):
    config = text_job(folder, *words)
    train(config)
    rows = read_examples(folder / "rows.jsonl", config.data)
    return config, Shelf(config.train.run_dir / "checkpoints").newest(), rows


def log_probs(module, prompt, tokens):
    """(T, V) fp64, of a plain forward."""
    ids = torch.cat([prompt.inputs["input_ids"][0], torch.tensor(tokens)])
    with torch.no_grad():
        logits = module(input_ids=ids[None]).logits[0].double()
    return logits[prompt.length - 1 : -1].log_softmax(-1)


def check(answer, row, config, student, teacher):
    """An answer is the student's greedy one, and each of its numbers is what the two distributions say."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    builder = PromptBuilder(tokenizer, config.prompts, config.media)
    ids = [tokenizer.convert_tokens_to_ids(t.text.strip()) for t in answer.tokens]
    log_p = log_probs(student, builder.student(row), ids)
    log_q = log_probs(teacher, builder.teacher(row), ids)
    specials = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    allowed = log_p.clone()
    allowed[:, [*specials, *range(len(tokenizer), log_p.shape[1])]] = -torch.inf
    assert allowed.argmax(-1).tolist() == ids
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    p, q = log_p.exp(), log_q.exp()
    divergence = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    for place, token in enumerate(answer.tokens):
        assert token.divergence == pytest.approx(divergence[place].item(), rel=1e-3, abs=1e-7)
        for side, log in ((token.student, log_p[place]), (token.teacher, log_q[place])):
            assert side.probability == pytest.approx(log[ids[place]].exp().item(), rel=1e-4)
            assert side.entropy == pytest.approx(-(log.exp() * log).sum().item(), rel=1e-4)
            best = log.topk(5)
            assert [c.text for c in side.top] == [name(tokenizer, i) for i in best.indices.tolist()]
            assert [c.probability for c in side.top] == pytest.approx(best.values.exp().tolist(), rel=1e-4)
            assert [c.written for c in side.top] == [i == ids[place] for i in best.indices.tolist()]
    assert answer.divergence == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert answer.right is bool(accuracy(answer.text, row.label))


def test_full_training_starting_model_and_checkpoint_with_its_averaged_teacher(tmp_path):
    config, last, rows = trained(tmp_path, "optim.lr=0.02")
    start = AutoModelForCausalLM.from_pretrained(config.model.path)
    student, teacher = (AutoModelForCausalLM.from_pretrained(last.path) for _ in range(2))
    averaged = load_file(last.path / "trainer.safetensors")
    teacher.load_state_dict(
        {n.removeprefix("teacher/"): t for n, t in averaged.items() if n.startswith("teacher/")}, strict=False
    )
    shown = replay(config, last, rows[:4])
    assert [one.row.id for one in shown] == [row.id for row in rows[:4]]
    for row, before, after in shown:
        check(before, row, config, start, start)
        check(after, row, config, student, teacher)
    assert any(one.before.text != one.after.text for one in shown), "training changed an answer"


def test_an_adapter_is_off_before_and_on_after(tmp_path):
    from peft import PeftModel

    config, last, rows = trained(tmp_path, "model.adapter=lora", "teacher.kind=frozen", "optim.lr=0.05")
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.path), last.path)
    for row, before, after in replay(config, last, rows[:3]):
        check(before, row, config, base, base)
        check(after, row, config, student, base)


def test_without_a_teacher_in_the_run_the_student_with_the_rationale_is_one(tmp_path):
    config, last, rows = trained(tmp_path, "objective.kind=sft")
    student = AutoModelForCausalLM.from_pretrained(last.path)
    (one,) = replay(config, last, rows[:1])
    check(one.after, one.row, config, student, student)


def test_a_row_without_rationale_has_no_teacher_to_be_compared_with(tmp_path):
    config, last, rows = trained(tmp_path)
    object.__setattr__(rows[1], "rationale", None)
    with_one, without = (one.before for one in replay(config, last, rows[:2]))
    assert without.divergence is None and all(t.teacher is None for t in without.tokens)
    assert with_one.divergence is not None and without.tokens[0].student.top


def test_top_tokens_are_those_of_the_whole_logits_in_chunks_of_one_row():
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 4), torch.randn(1 << 18, 4)  # 1 MiB a row
    for got, want in zip(top_tokens(hidden, Head(head), 5, workspace_mib=1), (hidden @ head.T).topk(5), strict=True):
        torch.testing.assert_close(got, want)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """Every token is one byte, so that a character can take several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("text", ["a 😀 b", "<script>", "é\n\t", "\u202e<b>"])
def test_pieces_join_to_the_text_and_a_character_belongs_to_its_last_token(bytes_tokenizer, text):
    ids = bytes_tokenizer(text)["input_ids"]
    found = pieces(bytes_tokenizer, ids)
    assert len(found) == len(ids) == len(text.encode()) and "".join(found) == text
    assert [piece for piece in found if piece] == list(text)


def test_half_a_character_at_the_end_is_shown_as_one(bytes_tokenizer):
    ids = bytes_tokenizer("a😀")["input_ids"][:-1]
    assert "".join(pieces(bytes_tokenizer, ids)).rstrip("\ufffd") == "a" and len(pieces(bytes_tokenizer, ids)) == 4


def test_names_make_space_visible(bytes_tokenizer):
    def of(text):
        return name(bytes_tokenizer, bytes_tokenizer(text)["input_ids"][0])

    assert (of(" "), of("\n"), of("x"), of("\x07")) == ("␣", "⏎", "x", "\ufffd")
    assert len(of("😀")) == 1 and of("😀") != "\ufffd", "a byte of a character as the vocabulary writes it"
    assert name(bytes_tokenizer, 9999) == "#9999"
