"""The packed engine on a GPU: equal to the plain path, never waiting, graphs, memory, tiers. Skipped without one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util

import pytest
import torch

from opsd.data import read_examples
from opsd.decode import Room, Slots
from opsd.engine import prefill, response_hidden
from opsd.graphs import Graphs
from opsd.loading import load_model
from opsd.model import LanguageModel
from opsd.objectives.distill import distill_loss
from opsd.objectives.logprobs import token_logprobs
from opsd.prefix_entry import PrefixKey, Stored, Version
from opsd.prefix_store import open_store
from opsd.prompts import PromptBuilder
from opsd.responses import Responses
from opsd.rollout import Rollouts, rollout
from opsd.sampling import Sampling
from tests.jobs import text_job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ADAPTER = ("model.dtype=bfloat16", "model.adapter=lora", "model.lora_r=4")
MIXED = ("model.dtype=bfloat16",)
CUDA = torch.device("cuda")
LENGTHS = [3, 1, 7, 2, 20, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda_engine")


def open_model(folder, *words: str):
    """The tiny text model on the device, and its prompts."""
    config = text_job(folder, "model.device=cuda", *words)
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    return model, [builder.student(e) for e in read_examples(config.data.train, config.data)], config


def responses_of(lengths: list[int], per_prompt: int) -> Responses:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(4, 20, (n,), generator=generator).tolist() for n in lengths]
    return Responses.pack(tokens, per_prompt, 0, CUDA)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm().clamp_min(1e-30)).item()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any call that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def results(model: LanguageModel, prompts, responses: Responses, share: bool) -> tuple[torch.Tensor, dict]:
    """Hidden states, and the gradient of every trained parameter."""
    model.module.zero_grad(set_to_none=True)
    hidden = response_hidden(model, prompts, responses, share)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(hidden.shape, generator=generator).to(hidden)
    (hidden * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}


def in_fp32(model: LanguageModel) -> LanguageModel:
    """The same weights, widened in place."""
    exact = copy.copy(model)
    exact.module, exact.config = model.module.float(), model.config.model_copy(update={"dtype": "float32"})
    return exact


@pytest.mark.parametrize("words", [(), ADAPTER, MIXED], ids=["fp32", "bf16-adapter", "bf16-full"])
def test_packed_is_as_good_as_plain(folder, words):
    """Hidden states and gradients: no further from fp32 than twice what transformers' own path is."""
    model, prompts, _ = open_model(folder, *words)
    with torch.no_grad():  # an adapter starts at B = 0, where A has no gradient to compare
        for name, p in model.trainable().items():
            if ".lora_B." in name:
                p.normal_(0, 0.1)
    responses = responses_of(LENGTHS, per_prompt=2)
    packed, packed_grads = results(model, prompts[:3], responses, share=True)
    plain, plain_grads = results(model, prompts[:3], responses, share=False)
    exact, exact_grads = results(in_fp32(model), prompts[:3], responses, share=False)
    slack = 2e-3 if words else 1e-4
    assert packed.isfinite().all()
    assert relative(packed, exact) < 2 * relative(plain, exact) + slack
    assert packed_grads.keys() == plain_grads.keys() == exact_grads.keys()
    for name, grad in exact_grads.items():
        assert relative(packed_grads[name], grad) < 2 * relative(plain_grads[name], grad) + slack, name


def test_token_logprobs_equal_fp64_and_hold_no_second_head():
    torch.manual_seed(0)
    size, width, n = 32768, 256, 64
    head = torch.randn(size, width, device=CUDA, dtype=torch.bfloat16).mul_(0.1).requires_grad_()
    hidden = torch.randn(n, width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.randint(size, (n,), device=CUDA)
    with torch.no_grad():
        token_logprobs(hidden, head, tokens, workspace_mib=4)  # GEMM workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logprobs(hidden, head, tokens, workspace_mib=4)
        assert torch.cuda.max_memory_allocated() - before < 8 * 2**20  # a widened head is 32 MiB
    got = token_logprobs(hidden, head, tokens, workspace_mib=4)
    got.sum().backward()
    wide, wide_head = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    want = (wide @ wide_head.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    want.sum().backward()
    assert (got - want).abs().max() < 1e-4
    assert relative(hidden.grad, wide.grad) < 0.01
    assert relative(head.grad, wide_head.grad) < 0.01


@pytest.mark.parametrize("words", [(), ADAPTER], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sampling", [Sampling.greedy(40), Sampling(3, 40, temperature=0.8, top_k=9)], ids=str)
def test_graphs_change_nothing(folder, words, sampling):
    """In bf16 a captured step runs the kernels of a step: the same to the bit. In fp32, without a kernel that is told
    how many keys count, it looks at the whole capacity, and sums may differ in their last bits."""
    model, prompts, _ = open_model(folder, *words)
    seeds = list(range(len(prompts)))
    stepping, captured = (Rollouts(model, slots=4, graphs=graphs) for graphs in (False, True))
    for _ in range(2):  # the second call finds its graphs
        want, got = stepping(prompts, sampling, seeds), captured(prompts, sampling, seeds)
        assert got.lengths == want.lengths
        assert got.tokens.equal(want.tokens)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=0 if words else 1e-4)
    assert captured._kept is not None and captured._kept[2]._captured, "nothing was captured"


def test_graphs_follow_an_update_of_the_weights(folder):
    model, prompts, _ = open_model(folder)
    kept, sampling = Rollouts(model, slots=4), Sampling.greedy(24)
    seeds = [0] * len(prompts)
    kept(prompts, sampling, seeds)
    with torch.no_grad():
        for p in model.trainable().values():
            p.mul_(-0.7)
    after = kept(prompts, sampling, seeds)
    assert after.tokens.equal(rollout(model, prompts, sampling, seeds, slots=4, graphs=False).tokens)


def test_greedy_equals_generate(folder):
    model, prompts, _ = open_model(folder)
    ours = rollout(model, prompts, Sampling.greedy(24), [0] * len(prompts), slots=4)
    for prompt, tokens, length in zip(prompts, ours.tokens, ours.lengths, strict=True):
        inputs = {name: x.to(CUDA) for name, x in prompt.inputs.items()}
        out = model.module.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=model.suppressed_ids)
        assert tokens[:length].tolist() == out[0, prompt.length :].tolist()


@pytest.mark.parametrize("words", [(), ADAPTER], ids=["fp32", "bf16"])
def test_sampled_logprobs_are_those_of_the_scored_response(folder, words):
    model, prompts, _ = open_model(folder, *words)
    out = rollout(model, prompts, Sampling(4, 24), list(range(len(prompts))))
    hidden = response_hidden(model, prompts, out)
    want = token_logprobs(hidden, model.head, out.packed_tokens)
    got = out.logprobs.flatten().index_select(0, out.packed_index)
    limit = 1e-3 if not words else 0.1  # of bf16 only the hidden states differ
    assert (got - want).abs().mean() < limit


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("words", [(), ADAPTER], ids=["fp32", "bf16"])
def test_decode_steps_never_wait(folder, words, graphs):
    model, prompts, _ = open_model(folder, *words)
    sampling, kept = Sampling(2, 60, temperature=0.9, top_p=0.95), Graphs()
    with torch.no_grad():
        stored = prefill(model, prompts[:3])
        slots = Slots(model, Room(6, 3, max(p.length for p in prompts), 6), sampling, stored[0])
        slots.draw.reset([1, 2, 3])
        for lane, one in enumerate(stored):
            slots.let_in(lane, one)
        slots.begin(list(range(6)), list(range(6)), [one for one in stored for _ in range(2)])
        slots.arrange([[0, 1], [2, 3], [4, 5]], fixed=True)

        def step() -> None:
            if graphs:
                kept.run(slots.capacity, lambda: slots.step(slots.capacity))
            else:
                slots.step(slots.capacity)

        for _ in range(3):  # lazy initialisation, capture, a replay
            step()
        with no_waiting():
            for _ in range(8):
                step()
    assert 1 <= slots.fed.max().item() <= 11


@pytest.mark.parametrize("words", [(), ADAPTER], ids=["fp32", "bf16"])
def test_a_pass_its_loss_and_its_backward_never_wait(folder, words):
    model, prompts, config = open_model(folder, *words)

    def learn(lengths: list[int]) -> None:
        responses = responses_of(lengths, per_prompt=2)
        hidden = response_hidden(model, prompts[:3], responses)
        with torch.no_grad():
            target = response_hidden(model, prompts[3:6], responses)
        loss, _ = distill_loss(hidden, model.head, target, None, responses.token_weights, config.objective)
        logprobs = token_logprobs(hidden, model.head, responses.packed_tokens)
        (loss + (logprobs * responses.token_weights).sum()).backward()

    learn(LENGTHS)  # kernels are loaded, workspaces made
    learn(LENGTHS)
    with no_waiting():
        learn(LENGTHS)
        learn(LENGTHS[::-1])  # another layout, none of it computed before


def test_memory_grows_with_tokens_and_not_with_prompts_times_responses(folder):
    """Twice the responses of one long prompt: the prompt's share of the memory stays."""
    model, prompts, _ = open_model(folder, *ADAPTER)
    ids = prompts[0].inputs["input_ids"]
    long = torch.cat([ids] * (200 // ids.shape[1]), 1)
    prompt = type(prompts[0])({"input_ids": long, "attention_mask": torch.ones_like(long)}, "")

    def peak(count: int, length: int, share: bool) -> int:
        responses = responses_of([length] * count, per_prompt=count)
        for _ in range(2):  # the first call makes workspaces
            model.module.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            response_hidden(model, [prompt], responses, share).square().sum().backward()
            torch.cuda.synchronize()
            found = torch.cuda.max_memory_allocated() - before
        model.module.zero_grad(set_to_none=True)
        return found

    one, sixteen = (peak(count, 9, True) for count in (1, 16))
    tokens = (prompt.length + 16 * 8) / (prompt.length + 8)
    assert sixteen < 2 * tokens * one
    assert peak(16, 9, False) > 3 * sixteen


def stored_of(seed: int, length: int = 7) -> Stored:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(CUDA, torch.bfloat16)

    layers = [[tensor(2, length, 8) for _ in range(3)] for _ in range(2)]
    return Stored(layers[0], layers[1], length, tensor(16))


def same(a: Stored, b: Stored) -> bool:
    return a.next_position == b.next_position and all(map(torch.equal, a.tensors(), b.tensors()))


@pytest.mark.parametrize("device_mib, host_mib", [(64, 64), (0, 64), (0, 0)], ids=["device", "host", "disk"])
def test_every_tier_gives_back_what_it_was_given(folder, tmp_path, device_mib, host_mib):
    config = text_job(
        folder,
        "engine.teacher_cache=disk",
        f"engine.teacher_cache_dir={tmp_path / 'cache'}",
        f"engine.teacher_cache_device_mib={device_mib}",
        f"engine.teacher_cache_host_mib={host_mib}",
    )
    store = open_store(config.engine, torch.device("cuda", torch.cuda.current_device()))
    assert store is not None
    version = Version("frozen")
    keys = [PrefixKey.of(version, torch.arange(i, i + 7)) for i in range(5)]
    for i, key in enumerate(keys):
        store.put(key, stored_of(i))
    for i, key in enumerate(keys):
        found = store.get(key)
        assert found is not None and all(t.is_cuda for t in found.tensors())
        assert same(found, stored_of(i))
    counts = store.metrics()
    tier = "device" if device_mib else "host" if host_mib else "disk"
    assert counts[f"{tier}_hits"] == 5 and counts["misses"] == 0


def test_tiers_of_memory_never_wait(folder):
    config = text_job(folder, "engine.teacher_cache_device_mib=0")
    store = open_store(config.engine, torch.device("cuda", torch.cuda.current_device()))
    assert store is not None
    key, given = PrefixKey.of(Version("frozen"), torch.arange(7)), stored_of(0)
    store.put(key, given)  # pinned memory is made
    with no_waiting():
        store.put(key, given)
        found = store.get(key)
    assert found is not None and same(found, given)


@pytest.mark.parametrize("words", [(), ADAPTER, MIXED], ids=["fp32", "bf16-adapter", "bf16-full"])
def test_layer_inputs_on_the_host_change_nothing_and_never_wait(folder, words):
    responses, found = responses_of(LENGTHS, per_prompt=2), []
    for value in ("true", "offload"):
        model, prompts, _ = open_model(folder, *words, f"model.activation_checkpointing={value}")
        with model.mode(train=True):
            found.append(results(model, prompts[:3], responses, share=True))  # and pinned memory is made
            with no_waiting():
                response_hidden(model, prompts[:3], responses).sum().backward()
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert relative(found[1][1][name], grad) < 1e-5, name


@pytest.mark.skipif(util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("words", [(), ADAPTER, MIXED], ids=["fp32", "bf16-adapter", "bf16-full"])
def test_ligers_layers_are_as_good_as_transformers(folder, words):
    responses = responses_of(LENGTHS, per_prompt=2)
    found = {}
    for choice in ("on", "off"):  # off comes last, and leaves the modeling file as it was
        model, prompts, _ = open_model(folder, *words, f"model.liger={choice}")
        assert model.fused == (choice == "on")
        found[choice] = results(model, prompts[:3], responses, share=True)
        if choice == "on":
            rollout(model, prompts, Sampling.greedy(40), [0] * len(prompts), slots=4)  # and captured in graphs
    exact = results(in_fp32(model), prompts[:3], responses, share=True)
    slack = 2e-3 if words else 1e-4
    assert not found["on"][0].equal(found["off"][0]), "the same kernels ran"
    assert relative(found["on"][0], exact[0]) < 2 * relative(found["off"][0], exact[0]) + slack
    for name, grad in exact[1].items():
        mine, theirs = (relative(found[choice][1][name], grad) for choice in ("on", "off"))
        assert mine < 2 * theirs + slack, name
