"""Prefixes in one byte a number: their bound, their error as it is told, and the same numbers found or not."""

from __future__ import annotations

import pytest
import torch

from opsd.config import load_config
from opsd.engine import response_hidden
from opsd.errors import InputError
from opsd.plan.names import PREFIXES
from opsd.plan.outline import outline
from opsd.plan.plan import make_plan
from opsd.plan.workload import Longest, Workload
from opsd.prefix_codes import decode, encode
from opsd.prefix_entry import Stored
from opsd.prefix_files import PrefixFiles
from opsd.prefix_store import MemoryTier, PrefixStore
from opsd.train import train
from tests.jobs import text_job
from tests.prefixes import key, same
from tests.test_teacher_cache import cache_of, setting  # noqa: F401 - a fixture

KINDS = ("int8", "fp8")


def prefix(name: int = 0, length: int = 50, dtype: torch.dtype = torch.float32) -> Stored:
    """3 layers of (2, length, 8); channel 5 of the keys is large in every token, and one token's values."""
    generator = torch.Generator().manual_seed(name)
    keys, values = ([torch.randn(2, length, 8, generator=generator) for _ in range(3)] for _ in ("keys", "values"))
    for k, v in zip(keys, values, strict=True):
        k[:, :, 5] *= 100
        v[:, 7] *= 100
    keys, values = ([x.to(dtype) for x in side] for side in (keys, values))
    return Stored(keys, values, length, torch.randn(16, generator=generator).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_found_within_the_bound(kind, dtype):
    exact = prefix(dtype=dtype)
    coded = encode(exact, kind)
    found = decode(coded)
    assert found.next_position == exact.next_position and torch.equal(found.last_hidden, exact.last_hidden)
    assert {x.dtype for x in (*found.keys, *found.values)} == {dtype}
    assert {x.element_size() for x in (*coded.keys, *coded.values)} == {1}
    for side, along in (("keys", 1), ("values", 2)):
        worst = 0.0
        for x, y in zip(getattr(exact, side), getattr(found, side), strict=True):
            x, y = x.double(), y.double()
            largest = x.abs().amax(along, keepdim=True)
            bound = largest / 254 if kind == "int8" else x.abs() / 16 + largest / 448 * 2**-10
            assert ((x - y).abs() <= bound * (1 + 1e-5) + 2**-8 * x.abs() * (dtype == torch.bfloat16)).all(), side
            assert (x - y).norm() > 1e-4 * x.norm(), "codes, not the numbers themselves"
            worst = max(worst, float((x - y).norm() / x.norm()))
        said = float(coded.error[("keys", "values").index(side)])
        assert said == pytest.approx(worst, rel=1e-4 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_none_and_nothing_stays_nothing(kind):
    exact = prefix()
    exact.keys[0][0, 3, 2], exact.values[1][1, 4, 4] = float("nan"), float("inf")
    exact.keys[1].zero_()
    found = decode(encode(exact, kind))
    assert found.keys[0][0, :, 2].isnan().all() and found.keys[0].isnan().sum() == 50
    assert found.values[1][1, 4].isnan().all() and found.values[1].isnan().sum() == 8
    assert (found.keys[1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_down_all_tiers_and_up_again_it_is_what_it_was_at_first(tmp_path, kind):
    one = encode(prefix(), kind).nbytes
    tiers = [MemoryTier(name, one, lambda x: x, lambda x: x.nbytes) for name in ("device", "host")]
    store = PrefixStore(torch.device("cpu"), tiers, PrefixFiles(tmp_path, 2**20), kind)
    first = {name: store.put(key(name), prefix(name)) for name in (1, 2, 3)}
    assert [len(list(tier.kept.items())) for tier in tiers] == [1, 1]
    for name in (1, 3, 2, 1):
        assert same(store.get(key(name)), first[name])
    assert store.metrics()["disk_hits"] == 3
    errors = torch.stack([encode(prefix(name), kind).error for name in (1, 2, 3)]).amax(0)
    assert list(store.errors().values()) == pytest.approx(errors.tolist())
    file = store.files._path(key(1))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert store.files.get(key(1)) is None and store.files.damaged == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_is_the_same_to_the_bit_as_the_first_time_and_near_the_exact(setting, kind):  # noqa: F811
    config, model, prompts, responses = setting
    cache = cache_of(config, model, prefix_dtype=kind)
    first = cache.hidden(model, None, prompts, responses, [False] * 3)
    assert torch.equal(cache.hidden(model, None, prompts, responses, [False] * 3), first)
    record = cache.metrics()
    assert record["teacher_cache_host_hits"] == 3
    assert 1e-4 < record["teacher_cache_key_error"] < 0.05 and 1e-4 < record["teacher_cache_value_error"] < 0.05
    exact = response_hidden(model, prompts, responses)
    off = float((first - exact).norm() / exact.norm())
    assert 1e-5 < off < 0.05
    plain = cache_of(config, model)
    plain.hidden(model, None, prompts, responses, [False] * 3)
    assert "teacher_cache_key_error" not in plain.metrics()
    bytes_of = [one.metrics()["teacher_cache_host_bytes"] for one in (cache, plain)]
    assert bytes_of[0] < 0.45 * bytes_of[1], "fp32 here, and a scale for each short row of values"


@torch.no_grad()
def test_one_representation_is_never_served_for_another(setting, tmp_path):  # noqa: F811
    config, model, prompts, responses = setting
    where = {"teacher_cache": "disk", "teacher_cache_dir": tmp_path / "shared"}
    states = {}
    for kind in ("exact", *KINDS):
        cache = cache_of(config, model, prefix_dtype=kind, **where)
        states[kind] = cache.hidden(model, None, prompts, responses, [False] * 3)
        cache.store.flush()
        assert cache.metrics()["teacher_cache_disk_hits"] == 0
    for kind, expected in states.items():
        cache = cache_of(config, model, prefix_dtype=kind, **where)
        assert torch.equal(cache.hidden(model, None, prompts, responses, [False] * 3), expected)
        assert cache.metrics()["teacher_cache_disk_hits"] == 3
        errors = cache.store.errors()
        assert bool(errors) == (kind != "exact"), "the error is in the file"


def test_runs_learn_the_same_whatever_was_kept_before(tmp_path):
    words = ["teacher.kind=frozen", "engine.teacher_cache=disk", f"engine.teacher_cache_dir={tmp_path / 'cache'}"]
    words += ["train.steps=3", "engine.prefix_dtype=int8"]
    runs = [train(text_job(tmp_path, *words, f"train.run_dir={tmp_path / name}")) for name in ("cold", "warm")]
    runs.append(train(text_job(tmp_path, *words, "engine.teacher_cache=memory", f"train.run_dir={tmp_path / 'other'}")))
    assert runs[1].teacher_cache.metrics()["teacher_cache_disk_hits"] > 0
    cold, *others = ([line["loss"] for line in run.directory.read("metrics")] for run in runs)
    assert others == [cold, cold]
    assert runs[0].directory.read("metrics")[-1]["teacher_cache_key_error"] > 0


def test_the_plan_counts_the_codes(tmp_path):
    planned = {}
    for kind in ("exact", "int8"):
        config = text_job(tmp_path, "teacher.kind=frozen", f"engine.prefix_dtype={kind}")
        model = outline(config.model, config.engine, None, cuda=False)
        work = Workload.of(config, Longest(40, 60, rows=1000))
        planned[kind] = make_plan(config, model, work, cuda=False, memory=1 << 40).phases["student"][PREFIXES]
    decoder = model.module.get_decoder().config
    heads = decoder.num_hidden_layers * decoder.num_key_value_heads
    width = decoder.hidden_size // decoder.num_attention_heads
    assert planned["exact"] == 1000 * 60 * heads * 2 * width * 4
    assert planned["int8"] == 1000 * 60 * heads * (2 * width + 4)


@pytest.mark.parametrize(
    "words", [["teacher.kind=ema"], ["teacher.kind=frozen", "engine.teacher_cache=none"]], ids=["moving", "not kept"]
)
def test_it_is_refused_where_nothing_would_be_kept(words):
    with pytest.raises(InputError, match=r"engine\.prefix_dtype"):
        load_config(None, ["model.path=x", "engine.prefix_dtype=int8", *words])
