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

from opsd_kernels import Divergence, Head, fused_token_kl
from opsd_kernels.checks import check_tensor

# Attributes of a config by which a family changes its logits: c * tanh(logits / c), after a scale.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Exponent of a scale, by the beginning of model_type; 0: the hidden state is scaled, before the head.
SCALES = {
    "logit_scale": {"cohere": 1},
    "logits_scaling": {"granite": -1, "hyperclovax": 1, "minicpm": 0},
    "lm_head_multiplier": {"falcon_h1": 1},
    "output_multiplier": {"muse_glimmer": 1},
}


def unwrapped(model: Any) -> Any:
    """The transformers model inside DistributedDataParallel and peft wrappers. Raises ValueError without one."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"expected a model of transformers, got {type(model).__name__}")
    return model


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
    found = {name: getattr(config, name, None) for name in (*SOFTCAPS, *SCALES)}
    return {
        name: value
        for name, value in found.items()
        if value is not None and (name in SOFTCAPS or (value != 1 and _exponent(model, name) != 0))
    }


def _exponent(model: Any, scale: str) -> int | None:
    """None for a family that is not known to use this scale."""
    family = str(unwrapped(model).config.get_text_config().model_type)
    return next((power for prefix, power in SCALES[scale].items() if family.startswith(prefix)), None)


def output_head(model: Any) -> Head:  # weight (V, D)
    """The model's head with its bias, scale and softcap.

    Raises ValueError for an adapter on the head, packed weights, and a scale in a family that is not in SCALES.
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
    scale, softcap = 1.0, None
    for key, value in logit_changes(model).items():
        power = None if key in SOFTCAPS else _exponent(model, key)
        if key in SOFTCAPS:
            softcap = float(value)
        elif power is None:
            raise ValueError(f"expected a family whose {key} is known (scales of the logits differ), got {name}")
        else:
            scale *= float(value) ** power
    return Head(module.weight, module.bias, scale, softcap)


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
    check_tensor("the hidden states", hidden)
    check_tensor("the mask", mask)
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
    student_hidden: Tensor, head: Tensor | Head, teacher_hidden: Tensor, teacher_head: Tensor | Head
) -> tuple[Tensor, Head, Tensor, Head | None]:
    """The operands of fused_token_kl with one dtype per side: autocast's where it is on, else that of the head.

    A shared head stays shared: its cast is made once. Raises ValueError for what is no tensor.
    """
    head, teacher_head = Head.of(head), Head.of(teacher_head)
    for side, hidden, one in (("student", student_hidden, head), ("teacher", teacher_hidden, teacher_head)):
        check_tensor(f"the {side}'s hidden states", hidden)
        check_tensor(f"the {side}'s head", one.weight)
        if one.bias is not None:
            check_tensor(f"the bias of the {side}'s head", one.bias)
    device = student_hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    student = head.to(dtype or head.weight.dtype)
    teacher = None if head.equals(teacher_head) else teacher_head.to(dtype or teacher_head.weight.dtype)
    teacher_dtype = (teacher or student).weight.dtype
    return student_hidden.to(student.weight.dtype), student, teacher_hidden.to(teacher_dtype), teacher


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
