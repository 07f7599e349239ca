"""Hugging Face causal models without their head: hidden states (B, S, D) out, no [tokens, vocabulary] tensor.

    hidden = hidden_states(model, input_ids=ids, attention_mask=mask)           # what the head would have been given
    loss = distillation_loss(model, inputs, mask, teacher_inputs, teacher_mask)  # the whole self-distillation step

Works for any class of transformers whose forward calls its output embedding once, plain or wrapped by peft or
DistributedDataParallel. Imports torch and opsd_kernels only, so a loop of your own may use it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opsd_kernels import Divergence, fused_token_kl

SOFTCAP = "final_logit_softcapping"  # cap * tanh(logits / cap)
# Attributes of a config by which a family multiplies or divides its logits.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def unwrapped(model: Any) -> Any:
    """The transformers model inside DistributedDataParallel and peft wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def skip_head(model: Any) -> Iterator[list[Tensor]]:
    """While open, a forward of the model hands its head zero rows; the list receives the rows it would have had."""
    seen: list[Tensor] = []

    def before_head(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][..., :0, :],)

    hook = unwrapped(model).get_output_embeddings().register_forward_pre_hook(before_head)
    try:
        yield seen
    finally:
        hook.remove()


def logit_changes(model: Any) -> dict[str, float]:
    """What the model's config does to its logits after the head, by name: a softcap, scales other than 1."""
    config = unwrapped(model).config.get_text_config()
    found = {name: getattr(config, name, None) for name in (SOFTCAP, *SCALES)}
    return {name: value for name, value in found.items() if value is not None and (name == SOFTCAP or value != 1)}


def output_head(model: Any) -> Tensor:  # (V, D)
    """Weight of the head, such that logits = hidden @ weight.T.

    Raises ValueError where that does not hold: a bias, a softcap or scale, an adapter on the head, packed weights.
    """
    name = type(unwrapped(model)).__name__
    module = unwrapped(model).get_output_embeddings()
    if module is None:
        raise ValueError(f"expected a model with an output head, got {name}, which has none")
    if hasattr(module, "modules_to_save"):  # peft trains a copy of the head and keeps the original for adapter-off
        module = (
            module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]
        )
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise ValueError(f"expected the head of {name} to be a plain nn.Linear, got {type(module).__name__}")
    if module.bias is not None:
        raise ValueError(f"expected the head of {name} without bias, got one")
    if changes := logit_changes(model):
        raise ValueError(f"expected logits that are head(hidden), nothing after it, got {name} with {changes}")
    return module.weight


def hidden_states(model: Any, **inputs: Any) -> Tensor:  # (B, S, D)
    """What the head would be given: hidden states after the final norm, differentiable, for inputs of the model.

    `logits_to_keep=k` keeps the last k positions, as it does for logits. Raises ValueError for `labels`, whose loss
    needs the logits, and for a model that calls its head other than once.
    """
    if inputs.get("labels") is not None:
        raise ValueError("expected inputs without labels (their loss needs the logits), got labels")
    with skip_head(model) as seen:
        model(**{"use_cache": False, **inputs})
    if len(seen) != 1:
        raise ValueError(f"expected {type(unwrapped(model)).__name__} to call its head once, got {len(seen)} calls")
    return seen[0]


def response_rows(hidden: Tensor, mask: Tensor) -> Tensor:  # (B, S, D), (B, S) bool -> (N, D)
    """The rows that predict the tokens under the mask: position t - 1 for token t. Waits for the device once."""
    if tuple(mask.shape) != tuple(hidden.shape[:2]):
        raise ValueError(f"expected a mask of shape {tuple(hidden.shape[:2])}, got {tuple(mask.shape)}")
    return hidden[:, :-1][mask[:, 1:].bool()]


def distillation_loss(
    student: Any,
    student_inputs: Mapping[str, Any],
    student_mask: Tensor,  # (B, S) bool: response tokens
    teacher_inputs: Mapping[str, Any],
    teacher_mask: Tensor,  # (B, S') bool: the same response tokens after the teacher's prompt
    *,
    teacher: Any = None,
    divergence: Divergence | str = "reverse_kl",
) -> Tensor:
    """Mean divergence of the response tokens, a scalar with gradient for the student's parameters.

    teacher: None is the student itself without gradient and dropout, and without its adapter where it has one.
    """
    with torch.no_grad(), _as_teacher(student if teacher is None else teacher, off=teacher is None) as model:
        teacher_hidden = response_rows(hidden_states(model, **teacher_inputs), teacher_mask)
        teacher_head = output_head(model)
    student_hidden = response_rows(hidden_states(student, **student_inputs), student_mask)
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"expected masks over the same tokens, got {len(student_hidden)} and {len(teacher_hidden)}")
    operands = matched(student_hidden, output_head(student), teacher_hidden, teacher_head)
    value = fused_token_kl(*operands, divergence=divergence)
    return value.sum() / max(len(value), 1)


def matched(
    student_hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The operands of fused_token_kl in one dtype: autocast's where it is on, else the head's. Shared heads stay so."""
    device = student_hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    other = None if teacher_head is head else teacher_head.detach().to(dtype)
    return student_hidden.to(dtype), head.to(dtype), teacher_hidden.to(dtype), other


@contextmanager
def _as_teacher(model: Any, off: bool) -> Iterator[Any]:
    """The model in eval mode, its adapter switched off if asked and there is one; both restored afterwards."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    training = {module: module.training for module in inner.modules()}
    inner.eval()
    try:
        with inner.disable_adapter() if off and hasattr(inner, "get_base_model") else nullcontext():
            yield inner
    finally:
        for module, mode in training.items():
            module.training = mode
