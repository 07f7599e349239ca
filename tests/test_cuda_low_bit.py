"""Four bits, 8-bit and paged moments on a GPU. Skipped without one, or without bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from opsd.config import OptimConfig
from opsd.data import read_examples
from opsd.engine import response_hidden
from opsd.loading import load_model
from opsd.optim import Optimizer
from opsd.prompts import PromptBuilder
from opsd.rollout import rollout
from opsd.sampling import Sampling
from tests.jobs import text_job

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]


@torch.no_grad()
def test_codes_packed_plain_and_captured_agree(tmp_path):
    words = ("model.device=cuda", "model.dtype=bfloat16", "model.adapter=lora", "model.quantize=nf4")
    config = text_job(tmp_path, *words, hidden_size=64, intermediate_size=128)
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = [builder.student(row) for row in read_examples(config.data.train, config.data)[:3]]
    sampling, seeds = Sampling(group_size=4, max_new_tokens=12, temperature=1.0), [1, 2, 3]
    captured, stepped = (rollout(model, prompts, sampling, seeds, graphs=graphs) for graphs in (True, False))
    assert captured.lengths == stepped.lengths and torch.equal(captured.tokens, stepped.tokens)
    packed, plain = (response_hidden(model, prompts, captured, shared).float() for shared in (True, False))
    assert (packed - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_large_moments_are_paged_and_resume_to_the_bit(kind):
    class Wide:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.module = nn.Linear(512, 512, device="cuda")

        def trainable(self) -> dict[str, nn.Parameter]:
            return dict(self.module.named_parameters())

    def steps(model: Wide, optimizer: Optimizer, numbers: range) -> dict[str, torch.Tensor]:
        for step in numbers:
            generator = torch.Generator("cuda").manual_seed(step)
            for p in model.trainable().values():
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step(step)
        return model.trainable() | optimizer.state()

    config = OptimConfig(kind=kind, lr=1e-2)
    whole, cut = Wide(), Wide()
    optimizer = Optimizer(whole, config, 6)
    saved = {name: x.detach().cpu().clone() for name, x in steps(whole, optimizer, range(3)).items()}
    held = optimizer.adamw.parts[0].state[whole.module.weight]["state1"]
    assert getattr(held, "is_paged", False) == kind.startswith("paged")
    cut.module.load_state_dict({name: saved[name] for name in ("weight", "bias")})
    resumed = Optimizer(cut, config, 6)
    resumed.load_state({name: x for name, x in saved.items() if "/" in name})
    expected, found = (steps(*run, range(3, 6)) for run in ((whole, optimizer), (cut, resumed)))
    assert all(torch.equal(found[name].cpu(), expected[name].cpu()) for name in expected)
