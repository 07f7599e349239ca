"""TRL on `fused_token_kl`: its divergence function, and its self-distillation trainers without full logits.

    class Trainer(FusedLossMixin, SDFTTrainer): ...   # trl.experimental.sdft; SDPOTrainer works the same way
    divergence, entropy = FusedDivergence.apply(...)  # the arguments of trl.kernels' ChunkedDivergenceFunction

Written for TRL 1.16 and imports nothing of it: the mixin overrides methods of the trainer that it is put before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from opsd.integrations.conventions import divergence_of
from opsd.integrations.hf import hidden_states, matched, output_head
from opsd_kernels import Head, fused_token_kl


class FusedDivergence:
    """In place of ChunkedDivergenceFunction: `apply` with its 12 positional arguments and its two results."""

    @staticmethod
    def apply(
        student_hidden: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        student_bias: Tensor | None,
        teacher_hidden: Tensor,  # (N, E)
        teacher_weight: Tensor,  # (V, E)
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence with gradient, student entropy without), each (N,) fp32.

        Under one weight for both sides scales, softcaps and biases that are equal keep it one head. A trained head
        wants one upstream number for all tokens (`.sum()`); others cost a second pass.
        """
        student = Head(student_weight, student_bias, student_logit_scale, student_final_logit_softcapping)
        teacher = Head(teacher_weight, teacher_bias, teacher_logit_scale, teacher_final_logit_softcapping)
        value, stats = fused_token_kl(
            *matched(student_hidden, student, teacher_hidden, teacher),
            divergence=divergence_of(beta, temperature),
            return_stats=True,
        )
        return value, stats.student_entropy


class Rows(NamedTuple):
    """What stands where TRL keeps logits: they would be those of the head on the hidden states."""

    hidden: Tensor  # (B, T, D)
    head: Head


class FusedLossMixin:
    """Before SDFTTrainer or SDPOTrainer: their `full_logits` objective from hidden states, everything else theirs.

    loss = mean over sequences of sum_t m_t r_t D_t / sum_t m_t, with TRL's loss mask m and, where the trainer keeps
    log-probabilities of the rollout, its clipped importance ratio r (without gradient). Neither model's logits exist.
    """

    args: Any
    temperature: float
    accelerator: Any
    model_kwarg_keys: Any
    _log_self_distillation_metric: Any
    _keeps_rows = False

    def _compute_teacher_student_logits(self, *args: Any, **kwargs: Any) -> Any:
        self._keeps_rows = self.args.distillation_mode == "full_logits"  # rollouts call _forward_logits for themselves
        try:
            return super()._compute_teacher_student_logits(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._keeps_rows = False

    def _forward_logits(self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Any:
        if not self._keeps_rows:
            return super()._forward_logits(model, input_ids, attention_mask, logits_to_keep)  # type: ignore[misc]
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "logits_to_keep" in self.model_kwarg_keys:
            inputs["logits_to_keep"] = logits_to_keep + 1
        return Rows(hidden_states(model, **inputs)[:, :-1][:, -logits_to_keep:], output_head(model))

    def _compute_self_distillation_loss(self, model: Any, inputs: Any, distillation_logits: Any) -> Tensor:
        student, teacher = distillation_logits.student_logits, distillation_logits.teacher_logits
        if not isinstance(student, Rows):
            return super()._compute_self_distillation_loss(model, inputs, distillation_logits)  # type: ignore[misc]
        mask = distillation_logits.loss_mask
        counted, lengths = mask.bool(), mask.sum(-1, keepdim=True).clamp(min=1)
        weights = (mask / lengths / len(mask))[counted]
        value, stats = fused_token_kl(
            *matched(student.hidden[counted], student.head, teacher.hidden[counted], teacher.head),
            divergence=divergence_of(self.args.distillation_alpha, self.temperature),
            token_weights=weights,
            tokens=distillation_logits.completion_ids[counted],
            return_stats=True,
        )
        old_logprob, clip = inputs.get("old_per_token_logps"), self.args.distillation_is_clip
        if clip is not None and old_logprob is not None:
            value = value * (stats.student_logprob - old_logprob[counted]).clamp(-20, 20).exp().clamp(max=clip)
        mean = (value.detach() / weights).sum() / mask.sum().clamp(min=1)
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
        return value.sum()
