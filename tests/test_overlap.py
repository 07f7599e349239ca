"""The overlap of the likeliest tokens against sets of a dense definition, and its place in the metrics."""

from __future__ import annotations

import pytest
import torch

import opsd.train
from opsd.objectives.overlap import K, topk_overlap
from opsd_kernels import Head
from tests.jobs import text_job


@pytest.mark.parametrize("tokens", [1, 7, 32, 100])
def test_it_is_the_share_of_a_dense_definition(tokens):
    draw = torch.Generator().manual_seed(tokens)
    student, head, other = (torch.randn(n, 8, generator=draw) for n in (tokens, 200, 200))
    teacher = student + 0.5 * torch.randn(tokens, 8, generator=draw)
    for theirs in (None, other):
        found = topk_overlap(student, Head(head), teacher, None if theirs is None else Head(theirs), k=5)
        both = [(s @ w.T.double()).topk(5).indices for s, w in
                ((student.double(), head), (teacher.double(), head if theirs is None else theirs))]  # fmt: skip
        dense = [len(set(a.tolist()) & set(b.tolist())) / 5 for a, b in zip(*both, strict=True)]
        chosen = [i * tokens // min(tokens, 32) for i in range(min(tokens, 32))]
        assert found.tolist() == pytest.approx([dense[i] for i in chosen])


def test_a_small_vocabulary_is_shared_whole():
    hidden, head = torch.randn(3, 8), Head(torch.randn(K - 1, 8))
    assert topk_overlap(hidden, head, -hidden, None).tolist() == [1.0] * 3


def test_it_is_in_the_lines_of_a_run(tmp_path):
    words = ("train.steps=3", "log.every=2", "engine.token_budget=64")
    lines = opsd.train.train(text_job(tmp_path, *words)).directory.read("metrics")
    assert [line["step"] for line in lines] == [2, 3]
    assert all(0 < line["topk_overlap"] <= 1 and "overlap_tokens" not in line for line in lines)


def test_it_is_one_where_the_teacher_is_the_student(tmp_path):
    run = opsd.train.train(text_job(tmp_path, "train.steps=1", "teacher.kind=live", "prompts.privilege=none"))
    assert run.directory.read("metrics")[-1]["topk_overlap"] == pytest.approx(1)
