"""Liger's layers in the language model: what is bound, that it computes the same, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

from opsd import liger, say
from opsd.errors import InputError
from opsd.loading import load_model
from tests.families import FAMILIES, build
from tests.jobs import text_job

ROOT = Path(__file__).parents[1]
BOUND = [one for one in FAMILIES.values() if one.config()[1].get_text_config().model_type in liger.NORMS]
installed = pytest.mark.skipif(util.find_spec("liger_kernel") is None, reason="needs liger-kernel")

# Triton's interpreter must be chosen before triton is imported, hence a process of its own.
COMPARE = """
import liger_kernel.ops.rms_norm
import numpy
import torch
from triton.runtime import interpreter
from opsd import liger
from tests.families import FAMILIES, build

def rsqrt(x):
    handle = x.handle
    return type(x)(type(handle)(1 / numpy.sqrt(handle.data), handle.dtype), x.dtype)

liger_kernel.ops.rms_norm.rsqrt = rsqrt  # that of libdevice is nothing but a name here

class Number(float):  # the interpreter hands kernels plain floats, of which these kernels ask a dtype
    def to(self, *_):
        return self

convert = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda x: Number(x) if type(x) is float else convert(x)

def run(module, ids):
    module.zero_grad()
    hidden = module.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in module.get_decoder().named_parameters() if p.grad is not None}

def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()

for family in FAMILIES.values():
    if family.name not in WANTED:
        continue
    module = build(family).float().eval()
    ids = torch.randint(4, 40, (1, 5), generator=torch.Generator().manual_seed(0))
    want, want_grads = run(module, ids)
    want_grads = {n: g.clone() for n, g in want_grads.items()}
    print(family.name, liger.bind(module.get_decoder(), "cpu"))
    got, got_grads = run(module, ids)
    assert not got.equal(want), "the same kernels ran"
    assert relative(got, want) < 1e-5, (family.name, relative(got, want))
    for name, grad in want_grads.items():
        assert relative(got_grads[name], grad) < 1e-4 or grad.norm() < 1e-6, (family.name, name)
"""


@installed
@pytest.mark.parametrize("names", [("llama", "gemma3"), ("qwen3", "qwen2_5_omni")], ids="+".join)
def test_bound_layers_compute_the_same_in_tritons_interpreter(names):
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]),
    }
    code = COMPARE.replace("WANTED", repr(names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(names)


@installed
@pytest.mark.parametrize("family", BOUND, ids=lambda family: family.name)
def test_every_norm_and_every_gate_of_the_decoder_is_bound_and_none_of_the_towers(family):
    module = build(family)
    decoder = module.get_decoder()
    norms = [m for m in decoder.modules() if type(m).__name__.endswith("RMSNorm")]
    try:
        counts = liger.bind(decoder, "cpu")
        assert counts["RMSNorm"] == len(norms) >= 2 * len(decoder.layers) + 1
        assert ("SwiGLU" in counts) == ("gemma" not in family.name and "moe" not in family.name)
        inside = set(decoder.modules())
        assert all(module in inside for module in module.modules() if "forward" in vars(module))
    finally:
        liger.use_liger(decoder, "off", "cpu")


def test_off_takes_back_what_the_file_of_a_family_shares():
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb
    decoder = build(FAMILIES["llama"]).get_decoder()
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    liger._rotate_with(decoder, lambda *_: (k, q), "cpu")
    liger._rotate_with(decoder, lambda *_: (k, q), "cpu")  # again: a second model
    assert modeling_llama.apply_rotary_pos_emb(q, k, q[:, 0], q[:, 0]) == (k, q)
    liger._rotate_with(decoder, lambda *_: (k, q), "cuda")  # these tensors are elsewhere
    assert modeling_llama.apply_rotary_pos_emb(q, k, q[:, 0], q[:, 0])[0].shape == q.shape
    liger.use_liger(decoder, "off", "cpu")
    assert modeling_llama.apply_rotary_pos_emb is own


def test_what_a_choice_came_to_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(say, "_said", set())
    decoder = build(FAMILIES["llama"]).get_decoder()
    monkeypatch.setattr(liger, "bind", lambda *_: {"RMSNorm": 5, "RoPE": 2})
    monkeypatch.setattr(liger, "_problem", lambda _, device: None if device == "cuda" else f"the model is on {device}")
    asked = [("auto", "cpu"), ("auto", "cuda"), ("on", "cuda"), ("off", "cuda")]
    with caplog.at_level("INFO", logger="opsd"):
        for _ in range(2):
            assert [liger.use_liger(decoder, *one) for one in asked] == [False, True, True, False]
    assert [record.message for record in caplog.records] == [
        "layers of the language model: transformers' (the model is on cpu)",
        "layers of the language model: Liger's RMSNorm (5), RoPE (2)",
        "layers of the language model: transformers'",
    ]


def test_on_is_refused_where_it_cannot_be(tmp_path):
    config = text_job(tmp_path, "model.liger=on", "model.device=cpu")
    with pytest.raises(InputError, match=r"model\.liger.*the model is on cpu"):
        load_model(config.model)


def test_the_reasons_against_it(monkeypatch):
    decoder = build(FAMILIES["llama"]).get_decoder()
    monkeypatch.setattr(liger.util, "find_spec", lambda _: None)
    assert "not installed" in (liger._problem(decoder, "cuda") or "")
    monkeypatch.setattr(liger.util, "find_spec", lambda _: object())
    assert liger._problem(decoder, "cuda") is None
    decoder.config.model_type = "another"
    assert "another" in (liger._problem(decoder, "cuda") or "")


@pytest.mark.parametrize("word, value", [("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on")])
def test_yaml_spells_on_and_off_as_booleans(tmp_path, word, value):
    assert text_job(tmp_path, f"model.liger={word}").model.liger == value
