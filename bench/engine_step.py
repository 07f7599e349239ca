"""One whole step, rollout to update, of opsd.train and of TRL's SDFTTrainer, on the same model, prompt and lengths."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.engine_cases import Shape, Size, llama, text, tokenizer, words
from bench.engine_tasks import Steps
from opsd.config import load_config
from opsd.group import Group, micro_batches
from opsd.metrics import Sums
from opsd.opening import open_run
from opsd.responses import Responses
from opsd.run import Run
from opsd.step import learn, sample, teach

RATE = 1e-6


@dataclass(frozen=True)
class Job:
    """A model folder and one row of data, of exact lengths in tokens."""

    folder: Path
    size: Size
    layers: int
    shape: Shape

    def write(self) -> None:
        vocab = self.size.vocab
        llama(self.size, self.layers).save_pretrained(self.folder / "model")
        tokenizer(vocab).save_pretrained(self.folder / "model")
        (self.folder / "rows.jsonl").write_text(json.dumps({"id": "row", **self.row}) + "\n", encoding="utf-8")

    @property
    def row(self) -> dict[str, str]:
        vocab, shape = self.size.vocab, self.shape
        prompt, rationale = words(shape.prompt, 0, vocab), words(shape.rationale, 1, vocab)
        return {"prompt": text(prompt), "rationale": text(rationale)}


@contextmanager
def opened(job: Job, *changes: str) -> Iterator[Run]:
    """A run of opsd.train on the job, its end token never drawn; the teacher's prompt is computed in every step."""
    run_dir = job.folder / f"run-{len(list(job.folder.glob('run-*')))}"
    config = load_config(None, [
        f"model.path={job.folder / 'model'}", f"data.train={job.folder / 'rows.jsonl'}", f"train.run_dir={run_dir}",
        "train.prompts_per_step=1", f"rollout.group_size={job.shape.group}",
        f"rollout.max_new_tokens={job.shape.response}", "teacher.kind=frozen", "engine.teacher_cache=none",
        "prompts.teacher_template={rationale}",
        f"optim.lr={RATE}", "log.progress=none", *changes,
    ])  # fmt: skip
    with open_run(config) as run:
        run.model.end_ids = [job.size.vocab]
        yield run


def step(run: Run) -> Tensor:
    """The body of opsd.train's loop, its log left out; returns the loss."""
    sums = Sums()
    group = sample(run, run.rows(0), 0)
    losses = [_learn(run, part, sums) for part in micro_batches(run.config, group)]
    run.optimizer.step(0)
    run.teacher.update()
    return torch.stack(losses).sum()


def _learn(run: Run, part: Group, sums: Sums) -> Tensor:
    loss = learn(run, part, teach(run, part), sums)
    loss.backward()
    return loss.detach()


def loss_of(run: Run, tokens: Tensor) -> Tensor:
    """Our loss of given responses (G, T) to the job's row, before any update."""
    example = run.rows(0)[0]
    answers = Responses(tokens, (tokens.shape[1],) * len(tokens), (0,) * len(tokens))
    group = Group([example], [run.prompts.student(example)], [run.prompts.teacher(example)], answers, [], {})
    loss = learn(run, group, teach(run, group), Sums())
    return loss.detach()


@contextmanager
def against_sdft(size: Size, layers: int, shape: Shape) -> Iterator[tuple[str, Steps]]:
    """The peer's name and both steps, warm; the gate compares the losses of the responses that the peer samples."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), size, layers, shape)
        job.write()
        name, peer, sampled = sdft(job)
        with opened(job) as run:

            def gate() -> None:
                tokens, loss = sampled()
                ours = loss_of(run, tokens)
                assert torch.allclose(ours, loss, rtol=1e-3), f"the losses differ: {ours:.6g} and {loss:.6g}"
                step(run)
                peer()

            yield name, Steps(lambda: step(run), peer, gate)


def sdft(job: Job) -> tuple[str, Callable[[], Any], Callable[[], tuple[Tensor, Tensor]]]:
    """The peer's name, its step, and its (responses, loss) for the gate: TRL's trainer, or without it what it does."""
    try:
        return ("TRL SDFT", *_trl(job))
    except ImportError:
        return ("full logits, as TRL SDFT", *_reproduction(job))


def _module(job: Job) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(job.folder / "model", attn_implementation="sdpa")


def _updated(module: Any, forward_backward: Callable[[], Any]) -> Callable[[], None]:
    """A step with the clip and the AdamW of our own."""
    adamw = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)

    def whole() -> None:
        forward_backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return whole


def _trl(job: Job) -> tuple[Callable[[], Any], Callable[[], tuple[Tensor, Tensor]]]:
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    shape, module = job.shape, _module(job)
    config = SDFTConfig(
        output_dir=str(job.folder / "trl"),
        per_device_train_batch_size=shape.group,
        num_generations=shape.group,
        max_prompt_length=None,
        max_completion_length=shape.response,
        generation_kwargs={"suppress_tokens": [0, 1]},
        distillation_mode="full_logits",
        distillation_alpha=0.5,
        gradient_checkpointing=False,  # faster, and ours does not either
        bf16=False,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    example = {"prompt": job.row["prompt"], "privileged_context": job.row["rationale"]}
    rows, words_of = Dataset.from_list([example]), tokenizer(job.size.vocab)
    made = SDFTTrainer(model=module, args=config, train_dataset=rows, processing_class=words_of)
    made.current_gradient_accumulation_steps = 1
    module.train()

    def gate() -> tuple[Tensor, Tensor]:
        batch = made._prepare_inputs([example] * shape.group)
        return batch["completion_ids"], made.compute_loss(module, batch).detach()

    return _updated(module, lambda: made.training_step(module, [example] * shape.group, None)), gate


def _reproduction(job: Job) -> tuple[Callable[[], Any], Callable[[], tuple[Tensor, Tensor]]]:
    shape, module, frozen = job.shape, _module(job), _module(job)
    words_of = tokenizer(job.size.vocab)
    prompt = words_of(job.row["prompt"], return_tensors="pt")["input_ids"].repeat(shape.group, 1)
    whole = words_of(f"{job.row['prompt']}\n\n{job.row['rationale']}", return_tensors="pt")["input_ids"]

    def sampled() -> Tensor:
        module.eval()
        out = module.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=shape.response,
            do_sample=True,
            top_k=0,
            suppress_tokens=[0, 1],
        )
        return out[:, shape.prompt :]

    def logits(model: Any, before: Tensor, tokens: Tensor) -> Tensor:
        ids = torch.cat([before.expand(len(tokens), -1), tokens], 1)
        mask = torch.ones_like(ids)
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=shape.response + 1)
        return out.logits[:, :-1]

    def loss(tokens: Tensor) -> Tensor:
        student = logits(module, prompt[:1], tokens).log_softmax(-1)
        with torch.no_grad():
            teacher = logits(frozen, whole, tokens).log_softmax(-1)
        mixture = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
        kl = torch.nn.functional.kl_div
        parts = [kl(mixture, one, reduction="none", log_target=True).sum(-1) for one in (student, teacher)]
        return (0.5 * (parts[0] + parts[1])).mean()

    def gate() -> tuple[Tensor, Tensor]:
        tokens = sampled()
        return tokens, loss(tokens).detach()

    return _updated(module, lambda: loss(sampled()).backward()), gate
