"""The plan against what torch allocates, and what `--dry-run` says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import opsd.train
from bench import plan_memory
from bench.engine_cases import Shape, Size
from bench.engine_memory import peak_of
from bench.engine_step import Job, opened
from opsd.autocast import OnMeta
from opsd.config import Config, dump_config, load_config
from opsd.errors import InputError
from opsd.plan import plan as plans
from opsd.plan.device import available, parsed
from opsd.plan.ledger import Ledger
from opsd.plan.names import ACTIVATIONS, GRADIENTS, HEAD, KNOBS, MOMENTS, WEIGHTS
from opsd.plan.outline import outline
from opsd.plan.plan import Plan, make_plan, room
from opsd.plan.shapes import Shapes
from opsd.plan.stand_ins import workspace_bytes
from opsd.plan.table import verdict
from opsd.plan.workload import Longest, Workload
from tests.families import FAMILIES
from tests.jobs import base_words, text_job

META = torch.device("meta")
SMALL = Size(3, 128, 4, 2, 256, 2048)
SHAPE = Shape(120, 30, 20, 4)


def planned(config: Config, shape: Shape, memory: int = 1 << 40, cuda: bool = False) -> Plan:
    model = outline(config.model, config.engine, None, cuda)
    work = Workload.of(config, Longest(shape.prompt, shape.prompt + shape.rationale, rows=1))
    return make_plan(config, model, work, cuda, memory)


# ledger


def test_the_ledger_knows_what_is_alive_and_when_there_was_most():
    ledger, layer = Ledger(), nn.Linear(10, 10, bias=False, device=META)
    ledger.name([layer.weight], WEIGHTS)
    with ledger.phase() as seen:
        x = torch.empty(100, 10, device=META)  # 4000 bytes
        y = layer(x)
        y.view(-1).add_(1)  # no memory of its own
        with ledger.under(HEAD):
            z = torch.cat([y, y, y])
        del z
        y.sum().backward()
        del x
    assert ledger.live == {WEIGHTS: 400, ACTIVATIONS: 4000 + 400, HEAD: 0}
    assert seen == {WEIGHTS: 400, ACTIVATIONS: 8000, HEAD: 12_000}
    ledger.name([layer.weight.grad], GRADIENTS)
    assert ledger.live[GRADIENTS] == 400 and ledger.live[ACTIVATIONS] == 4000


def test_a_phase_begins_with_what_is_alive():
    ledger = Ledger(block=512)
    with ledger.phase():
        kept, gone = torch.empty(1, device=META), torch.empty(10_000, device=META)
        del gone
    with ledger.phase() as seen:
        other = torch.empty(1, device=META)
    assert seen == {ACTIVATIONS: 1024}, "in blocks of the allocator, without the peak of the phase before"
    assert kept.shape == other.shape


def test_remembered_shapes_are_those_of_the_operators():
    shapes, aten = Shapes(), torch.ops.aten
    a, b, c = torch.empty(3, 4, device=META), torch.empty(4, device=META), torch.empty(4, 3, device=META).t()
    calls = [
        (aten.add.Tensor, (a, b)),
        (aten.add.Tensor, (a, c)),
        (aten.sum.dim_IntList, (a, [0])),
        (aten.sum.dim_IntList, (a, [1])),
        (aten._to_copy.default, (a,), {"dtype": torch.bfloat16}),
        (aten.native_layer_norm.default, (a, [4], None, None, 1e-5)),
    ]
    for func, args, *rest in calls * 2:
        kwargs = rest[0] if rest else {}
        expected, found = func(*args, **kwargs), shapes(func, args, kwargs)
        pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
        assert all((x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype) for x, y in pairs), func
    assert shapes(aten.t.default, (a,), {}).untyped_storage()._cdata == a.untyped_storage()._cdata, "a view stays one"
    assert shapes(aten.add_.Tensor, (a, 1), {}) is a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_have_the_shapes_of_a_device(dtype):
    rows, experts = torch.ones(10, 16, dtype=dtype), torch.ones(4, 23, 16, dtype=dtype).mT
    upstream, ends = torch.ones(10, 24, dtype=dtype)[:, :23], torch.tensor([2, 5, 7, 10], dtype=torch.int32)
    for a, b in ((rows, experts), (upstream, experts.mT), (rows.mT, upstream)):
        real = torch.nn.functional.grouped_mm(a, b, offs=ends)
        found = Shapes()(torch.ops.aten._grouped_mm.default, (a.to(META), b.to(META)), {"offs": ends.to(META)})
        assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), dtype)


def test_autocast_on_meta_keeps_what_autocast_keeps():
    layer = nn.Linear(8, 8, bias=False)

    def kept(layer: nn.Linear, context: object) -> list[tuple[torch.Size, torch.dtype]]:
        found = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: found.append((x.shape, x.dtype)) or x, lambda x: x)
        with hooks, context:  # type: ignore[attr-defined]
            x = torch.ones(2, 8, device=layer.weight.device, requires_grad=True)
            layer(torch.nn.functional.silu(layer(x * 2)))
        return found

    real = kept(layer, torch.autocast("cpu", dtype=torch.bfloat16))
    assert kept(layer.to(META), OnMeta(torch.bfloat16)) == real


# plan


@pytest.mark.parametrize(
    "words",
    [
        ("model.adapter=lora", "engine.token_budget=4096"),
        ("model.adapter=lora", "engine.token_budget=180"),
        ("model.adapter=lora", "engine.token_budget=4096", "model.activation_checkpointing=true"),
        ("engine.token_budget=4096",),
        ("engine.token_budget=4096", "model.dtype=bfloat16"),
        ("engine.token_budget=4096", "objective.divergence=reverse_kl", "objective.workspace_mib=2"),
    ],
    ids=["adapter", "small passes", "checkpointing", "all weights", "mixed", "small workspace"],
)
def test_passes_are_planned_as_torch_allocates_them(tmp_path, words):
    job = Job(tmp_path, SMALL, SMALL.layers, SHAPE)
    job.write()
    with opened(job, *words) as run:
        peak = peak_of(run, SHAPE)
        plan = planned(run.config, SHAPE)
    student = plan.phases["student"]
    extra = student.total() - student[WEIGHTS] - student["adapter"] - student[MOMENTS] - student[GRADIENTS]
    extra -= student["teacher's weights"] + student["prompts and media"]
    assert extra == pytest.approx(peak, rel=0.08)


def test_a_step_is_planned_within_a_tenth_of_its_resident_memory():
    """The smallest of `bench.plan_memory`; the others are in bench/results."""
    found = plan_memory.run_case(plan_memory.MODULE, 2)
    assert found["ratio"] == pytest.approx(1, abs=0.1), found


def test_the_largest_budget_fits_and_a_larger_one_does_not(tmp_path):
    config = text_job(tmp_path, "engine.token_budget=auto", "train.prompts_per_step=8", "rollout.max_new_tokens=40")
    shape = Shape(100, 20, 40, 3)
    whole = planned(config, shape)
    assert whole.largest == whole.whole == whole.budget == 8 * (120 + 3 * 40)
    least = planned(config, shape, memory=1)
    assert least.largest is None and not least.fits
    middle = (whole.peak + least.peak) / 2
    plan = planned(config, shape, memory=int(middle / (1 - plans.MARGIN)))
    assert plan.fits and plan.peak <= room(plan.memory)
    assert plan.budget == plan.largest < whole.whole
    larger = load_config(None, [*base_words(tmp_path), "train.prompts_per_step=8", "rollout.max_new_tokens=40",
                                f"engine.token_budget={2 * plan.budget}"])  # fmt: skip
    assert not planned(larger, shape, memory=plan.memory).fits


def test_the_largest_budget_is_the_same_whatever_budget_is_asked_for(tmp_path):
    shape = Shape(100, 20, 40, 3)
    words = ("train.prompts_per_step=6", "rollout.max_new_tokens=40", "evaluate.batch_size=1")
    work = Workload.of(text_job(tmp_path, *words), Longest(100, 120, rows=1))
    assert work.passes == [160, 200, 240, 480, 720, 960, 1200, 1440]
    fits, over = (planned(text_job(tmp_path, *words, f"engine.token_budget={size}"), shape).peak for size in (720, 960))
    memory = int((fits + over) / 2 / (1 - plans.MARGIN))
    for asked in ("auto", "161", "330", "1000", "100000"):
        plan = planned(text_job(tmp_path, *words, f"engine.token_budget={asked}"), shape, memory)
        assert plan.largest == 720, asked


def test_what_a_knob_moves(tmp_path):
    shape = Shape(60, 10, 8, 3)

    def lines(*words: str) -> dict[str, dict[str, int]]:
        return planned(text_job(tmp_path, "engine.token_budget=4096", *words), shape).phases

    full, lora = lines(), lines("model.adapter=lora", "model.lora_r=1")
    assert full["student"][MOMENTS] == 2 * full["update"][GRADIENTS]
    assert full["student"][WEIGHTS] == pytest.approx(full["update"][GRADIENTS], rel=0.01), "and a few buffers"
    assert lora["student"][MOMENTS] < full["student"][MOMENTS] / 2
    assert full["student"]["teacher's weights"] == full["update"][GRADIENTS]
    assert lines("teacher.kind=frozen", "model.adapter=lora")["student"]["teacher's weights"] == 0
    assert lines("model.activation_checkpointing=true")["student"][ACTIVATIONS] < full["student"][ACTIVATIONS]
    assert lines("engine.token_budget=100")["student"][ACTIVATIONS] < full["student"][ACTIVATIONS]
    assert lines("rollout.max_new_tokens=200")["rollout"].total() > full["rollout"].total()
    long, few = Shape(400, 10, 2, 3), "rollout.max_new_tokens=2"
    some, every = (planned(text_job(tmp_path, few, f"engine.token_budget={n}"), long).phases for n in (420, 4096))
    assert some["rollout"].total() < every["rollout"].total(), "a prompt at a time"
    assert "teacher" not in lines("objective.kind=sft") and "teacher" not in lines("objective.kind=reward")


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_gradients_that_go_with_their_update(tmp_path, clip):
    shape = Shape(60, 10, 8, 3)

    def phases(budget: int, *words: str) -> dict[str, dict[str, int]]:
        words = (f"engine.token_budget={budget}", f"optim.max_grad_norm={clip}", *words)
        return planned(text_job(tmp_path, *words), shape).phases

    plain, mine = phases(4096), phases(4096, "optim.in_backward=true")
    assert mine["student"][GRADIENTS] < 0.6 * plain["student"][GRADIENTS]
    assert mine["update"][GRADIENTS] == 0 and mine["update"][MOMENTS] == plain["update"][MOMENTS]
    several = phases(100, "optim.in_backward=true")
    assert several == phases(100), "between passes the gradients of all weights wait"


def test_the_workspace_is_that_of_the_loss():
    vocab, width, tokens = 4096, 64, 3000
    row = 4 * (2 * vocab + 4 * width)
    head = torch.empty(vocab, width, device=META)
    assert workspace_bytes(tokens, head, 1200, cuda=False) == 512 * row, "rows of logits, gradients in their place"
    assert workspace_bytes(100, head, 1200, cuda=False) == 100 * row
    assert workspace_bytes(tokens, head, 10, cuda=False) <= 10 << 20
    half = head.bfloat16()
    assert workspace_bytes(tokens, half, 1200, cuda=True) == 512 * (row + 2 * vocab), "gradient rows in bf16"
    assert workspace_bytes(tokens, half, 1200, cuda=False) == 512 * row + 4 * half.numel(), "a head that is widened"


# commands


def dry(config: Config, folder: Path, *flags: str) -> int:
    """The exit status of a dry run of a config in a file."""
    dump_config(config, folder / "config.yaml")
    return opsd.train.main([str(folder / "config.yaml"), "--dry-run", *flags])


def test_a_budget_that_fits_is_not_told_to_be_too_large():
    """Passes of at most 8192 tokens have 7096 where the responses of a prompt stay together."""
    phases = {"student": Counter({WEIGHTS: 50})}
    assert verdict(Plan(phases, 8192, 100, 7096, 20_000), "student")[-1].endswith(": 8192")
    assert verdict(Plan(phases, 9000, 40, 7096, 20_000), "student")[-1].endswith(": 7096")


def test_a_dry_run_shows_prompts_and_table(tmp_path, capsys):
    config = text_job(tmp_path)
    assert dry(config, tmp_path, "--memory", "64MiB") == 0
    said = capsys.readouterr().out
    assert "  | user : the clip shows" in said and "Evidence from an observer" in said
    for name in (WEIGHTS, MOMENTS, GRADIENTS):
        assert f"\n{name} " in said and KNOBS[name] in said
    assert "does not fit" not in said and "largest engine.token_budget that fits" in said
    assert not (tmp_path / "run").exists()
    assert dry(config, tmp_path, "--memory", "0.1MiB") == 0
    assert "does not fit" in (said := capsys.readouterr().out) and "not even one response" in said


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # without files, Qwen2's tokenizer is empty instead of an error
def test_a_dry_run_needs_neither_weights_nor_tokenizer_nor_rows(tmp_path, capsys, family):
    config = text_job(tmp_path)
    for file in (tmp_path / "model").iterdir():
        if file.name != "config.json":
            file.unlink()
    told = json.loads((tmp_path / "model/config.json").read_text())
    told |= {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    (tmp_path / "model/config.json").write_text(json.dumps(told))
    assert dry(config, tmp_path, "--memory", "1GiB") == 0
    said = capsys.readouterr().out
    assert "no prompts to show" in said and "not counted by a tokenizer" in said
    bare = config.model_copy(update={"data": config.data.model_copy(update={"train": None})})
    assert dry(bare, tmp_path, "--memory", "1GiB") == 2
    assert "expected rows, or --prompt-tokens" in capsys.readouterr().err
    assert dry(bare, tmp_path, "--memory", "1GiB", "--prompt-tokens", "50") == 0
    assert "50 tokens (teacher 50), not counted by a tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("model.adapter=lora",), (), ("model.dtype=bfloat16",)])
def test_a_dry_run_of_a_mixture_of_experts_in_fp32(tmp_path, capsys, words):
    name, made = FAMILIES["qwen3_omni_moe"].config()
    made.architectures = [name]
    made.save_pretrained(tmp_path / "model")
    config = load_config(None, [f"model.path={tmp_path / 'model'}", "rollout.max_new_tokens=20", *words])
    assert dry(config, tmp_path, "--memory", "24GiB", "--prompt-tokens", "50") == 0
    assert "largest engine.token_budget that fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "field"), [(["--memory", "much"], "--memory"), (["engine.share_prefix=false"], "plain twin")]
)
def test_a_dry_run_that_cannot_be(tmp_path, capsys, words, field):
    assert dry(text_job(tmp_path, *[w for w in words if "=" in w]), tmp_path, *[w for w in words if "=" not in w]) == 2
    assert field in capsys.readouterr().err


def test_auto_takes_the_largest_passes_and_keeps_them(tmp_path, monkeypatch):
    config = text_job(tmp_path, "engine.token_budget=auto", "train.steps=1", "optim.schedule=constant")
    run = opsd.train.train(config)
    assert json.loads((tmp_path / "run" / "passes.json").read_text()) == {"token_budget": run.budget.tokens}
    assert run.budget.tokens > 64
    monkeypatch.setattr("opsd.opening.fitting_budget", None)  # nobody asks again
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
    assert opsd.train.train(longer, resume=True).budget.tokens == run.budget.tokens


def test_auto_where_nothing_fits_ends_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.plan.start.available", lambda _: 1000)
    with pytest.raises(InputError, match="for one response with its prompt"):
        opsd.train.train(text_job(tmp_path, "engine.token_budget=auto"))
    assert not (tmp_path / "run").exists()


def test_auto_of_a_run_that_never_began_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise InputError("a folder", "none", field="engine.teacher_cache_dir")

    monkeypatch.setattr("opsd.opening._teacher_cache", fail)
    with pytest.raises(InputError, match="teacher_cache_dir"):
        opsd.train.train(text_job(tmp_path, "engine.token_budget=auto"))
    assert not (tmp_path / "run").exists()


def test_sizes():
    assert parsed("24GiB") == 24 << 30 and parsed("1.5 GB") == 1_500_000_000 and parsed("512MiB") == 512 << 20
    for wrong in ("24", "GiB", "-1GiB", "0GiB", "24 TiB"):
        with pytest.raises(InputError):
            parsed(wrong)
    assert available(torch.device("cpu")) > 0


def test_held_out_losses_take_the_passes_of_the_run(tmp_path):
    both = [f"data.validation={tmp_path / 'rows.jsonl'}", "evaluate.every=2", "checkpoint.best=loss"]
    run = opsd.train.train(text_job(tmp_path, "engine.token_budget=auto", *both))
    assert any("loss" in record for record in run.directory.read("evaluations"))
