"""A plan whose layers are rehearsed once is the plan of all of them, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from opsd.config import Config, load_config
from opsd.model import LanguageModel
from opsd.plan import alike, rehearse, round_trip
from opsd.plan.ledger import Ledger
from opsd.plan.outline import outline
from opsd.plan.plan import Plan, make_plan
from opsd.plan.workload import Longest, Workload
from tests.families import FAMILIES

LAYERS = 6
WORDS = {
    "adapter": ("model.adapter=lora", "model.dtype=bfloat16"),
    "mixed": ("model.dtype=bfloat16", "evaluate.batch_size=3"),
    "codes": ("model.adapter=lora", "model.quantize=nf4", "engine.prefix_dtype=int8"),
    "checkpointed": ("model.adapter=lora", "model.dtype=bfloat16", "model.activation_checkpointing=true"),
    "offloaded": ("model.adapter=lora", "model.dtype=bfloat16", "model.activation_checkpointing=offload"),
    "full": ("model.activation_checkpointing=true",),
    "in passes": ("engine.token_budget=300",),
    "in backward": ("optim.in_backward=true", "optim.max_grad_norm=null"),
    "twice": ("optim.in_backward=true",),
}
NO_TRIPS = ("mixed", "offloaded", "twice")  # layers leave copies of weights, their inputs, their graphs


def written(folder: Path, family: str) -> None:
    """config.json of a family's tiny model with some more layers."""
    name, config = FAMILIES[family].config()
    decoder = config.get_text_config()
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = (list(decoder.layer_types) * LAYERS)[:LAYERS]
    decoder.num_hidden_layers = LAYERS
    config.architectures = [name]
    config.save_pretrained(folder)


def planned(config: Config, cuda: bool, wide: int | None) -> Plan:
    """wide: a layer that is to need more than the others."""
    model = outline(config.model, config.engine, None, cuda)
    if wide is not None:
        layer, width = model.module.get_decoder().layers[wide], config_width(model)
        layer.mlp = nn.Sequential(nn.Linear(width, 999, device="meta"), nn.Linear(999, width, device="meta"))
    return make_plan(config, model, Workload.of(config, Longest(student=40, teacher=50, rows=20)), cuda, 1 << 24)


def config_width(model: LanguageModel) -> int:
    return model.module.get_decoder().config.hidden_size


CASES = [
    *((family, "adapter", None) for family in ("qwen2", "qwen2_windowed", "gemma3", "cohere", "qwen3_omni_moe")),
    *(("qwen2_5_omni", "codes", None), ("qwen2", "mixed", None), ("qwen2", "adapter", 4)),
    *(("qwen2", words, None) for words in ("offloaded", "full", "in passes", "in backward", "twice")),
    *(("qwen2_windowed", "checkpointed", None), ("qwen2", "checkpointed", 4)),
]


@pytest.mark.parametrize(("family", "words", "wide"), CASES)
def test_told_layers_take_what_seen_ones_do(tmp_path, monkeypatch, family, words, wide):
    if words == "codes":
        pytest.importorskip("bitsandbytes")
    written(tmp_path / "model", family)
    (tmp_path / "config.yaml").write_text("{}")
    own = [f"model.path={tmp_path / 'model'}", "teacher.kind=frozen", "rollout.max_new_tokens=30", "rollout.slots=7"]
    config = load_config(tmp_path / "config.yaml", [*own, "data.test=rows.jsonl", *WORDS[words]])
    told, rise, trips, cuda = [], Ledger.rise, [], words == "codes"
    monkeypatch.setattr(Ledger, "rise", lambda self, by: (told.append(by), rise(self, by)))
    monkeypatch.setattr(alike, "told", lambda *args: (trips.append(len(args)), round_trip.told(*args))[1])
    found = planned(config, cuda, wide)
    assert bool(told) == (words != "mixed")
    assert bool(trips) == (words not in NO_TRIPS)
    monkeypatch.setattr(rehearse, "Alike", lambda ledger, layers, trips: None)
    told.clear()
    assert planned(config, cuda, wide) == found and not told
