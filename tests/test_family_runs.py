"""Every family through `opsd.train` itself: trained, resumed, opened with plain transformers and peft."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers

from opsd.metrics import Sums
from opsd.opening import open_run
from opsd.rollout import rollout
from opsd.run_dirs import with_run_dir
from opsd.sampling import Sampling
from opsd.step import learn, sample, teach
from opsd.train import train
from tests.families import Double
from tests.family_jobs import MULTIMODAL, TEXT, family_job
from tests.omni_models import WHOLE
from tests.test_resume import assert_same

LENGTH = 6


@pytest.fixture(scope="module", params=[(n, a) for n in (*MULTIMODAL, *TEXT) for a in ("none", "lora")], ids="-".join)
def trained(request, tmp_path_factory):
    """(class name, config, the run after two steps)."""
    name, adapter = request.param
    config = family_job(tmp_path_factory.mktemp(name), name, f"model.adapter={adapter}")
    run = train(config)
    inner = run.model.module.get_base_model() if adapter == "lora" else run.model.module
    return type(inner).__name__, config, run


def last_checkpoint(config):
    return config.train.run_dir / "checkpoints" / "last"


def plainly(cls, config):
    """The trained model as somebody opens it who has never heard of opsd."""
    if config.model.adapter == "none":
        return getattr(transformers, cls).from_pretrained(last_checkpoint(config)).eval()
    from peft import PeftModel

    base = getattr(transformers, cls).from_pretrained(config.model.path)
    return PeftModel.from_pretrained(base, last_checkpoint(config)).eval()


def views(run):
    return [run.prompts.student(row) for row in run.train]


def test_training_moved_the_weights(trained):
    cls, config, run = trained
    start = getattr(transformers, cls).from_pretrained(config.model.path)
    moved = plainly(cls, config)
    prompt = views(run)[0].inputs
    with torch.no_grad():
        assert (moved(**prompt).logits - start(**prompt).logits).abs().max() > 1e-3


def test_resumed_is_uninterrupted_bit_for_bit(trained, tmp_path):
    _, config, _ = trained
    cut = tmp_path / "cut"
    shutil.copytree(config.train.run_dir, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-000002")
    train(with_run_dir(config, cut), resume=True)
    assert_same(cut, config.train.run_dir, files=("samples.jsonl",))


def test_plain_transformers_and_peft_give_the_same_answers(trained):
    """Greedy, and as likely as our own sampled ones; an adapter merged into its base has the same logits."""
    cls, config, run = trained
    plain = plainly(cls, config)
    ours = rollout(run.model, views(run), Sampling.greedy(LENGTH), [0] * len(run.train))
    for prompt, tokens, n in zip(views(run), ours.tokens, ours.lengths, strict=True):
        answer = plain.generate(
            **prompt.inputs, max_new_tokens=LENGTH, do_sample=False, suppress_tokens=run.model.suppressed_ids
        )
        assert answer[0, prompt.length :].tolist() == tokens[:n].tolist()
    drawn = rollout(run.model, views(run), Sampling(2, LENGTH), [1, 2, 3])
    for tokens, found, n, owner in zip(drawn.tokens, drawn.logprobs, drawn.lengths, drawn.owners, strict=True):
        with torch.no_grad():
            wanted = log_probabilities(plain, views(run)[owner], tokens[:n]).gather(1, tokens[:n, None])[:, 0]
        torch.testing.assert_close(found[:n], wanted, rtol=1e-4, atol=1e-4)
    if config.model.adapter == "lora":
        with torch.no_grad():
            beside = plain(**views(run)[0].inputs).logits
            merged = plain.merge_and_unload()(**views(run)[0].inputs).logits
        torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)


def test_the_processor_of_a_checkpoint_is_the_models_own(trained):
    from opsd.processing import load_processor, read_processor_files

    _, config, run = trained
    last = last_checkpoint(config)
    assert read_processor_files(last) == run.model.processor_files
    source = last if config.model.adapter == "none" else config.model.path  # an adapter's folder has no config.json
    assert type(load_processor(source)).__name__ == type(run.model.processor).__name__


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_omni_checkpoint_is_trained_as_its_thinker(name, tmp_path):
    """Written by transformers in several files, with its talker: the same bits as the thinker alone."""
    configs = [family_job(tmp_path / kind, name, whole=kind == "whole") for kind in ("whole", "thinker")]
    for config in configs:
        train(config)
    assert_same(*(config.train.run_dir for config in configs), files=("samples.jsonl",))


@pytest.mark.parametrize("name", [*MULTIMODAL, *TEXT])
def test_the_loss_is_that_of_a_plain_forward_with_the_same_media(name, tmp_path):
    """Packed rollout, teacher and student against `model(**inputs).logits`, one response at a time, in fp64."""
    config = family_job(tmp_path, name, "engine.feature_cache_mib=0")
    with open_run(config) as run:
        group = sample(run, run.rows(0), 0)
        ours = learn(run, group, teach(run, group), Sums())
        ours.backward()
        found = {n: p.grad for n, p in run.model.trainable().items() if p.grad is not None}
        plain = type(run.model.module).from_pretrained(config.model.path).double()
        plain.get_decoder().config._experts_implementation = "eager"  # grouped GEMMs have no fp64
        with Double():
            loss = dense_loss(plain, group)
            loss.backward()
    torch.testing.assert_close(ours.double(), loss, rtol=1e-4, atol=1e-7)
    assert loss > 1e-3
    largest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for key, p in plain.named_parameters():
        if p.grad is not None:
            assert (found[key] - p.grad).norm() < 1e-3 * p.grad.norm() + 1e-5 * largest, key


def dense_loss(plain, group):
    """Mean over responses of the mean JSD (beta 0.5) of their tokens."""
    total, responses = 0.0, group.responses
    for tokens, length, owner in zip(responses.tokens, responses.lengths, responses.owners, strict=True):
        p = log_probabilities(plain, group.prompts[owner], tokens[:length])
        with torch.no_grad():
            q = log_probabilities(plain, group.views[owner], tokens[:length])
        m = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=torch.float64).log()
        divergence = 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)
        total = total + divergence.mean() / len(responses.lengths)
    return total


def log_probabilities(plain, prompt, tokens):
    """(T, V) of a plain forward over the prompt with its media and the tokens."""
    inputs = {n: x.to(plain.dtype) if x.is_floating_point() else x for n, x in prompt.inputs.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        nothing = torch.zeros_like(tokens)[None]
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], nothing], 1)
    return plain(**inputs, use_cache=False).logits[0, prompt.length - 1 : -1].log_softmax(-1)
