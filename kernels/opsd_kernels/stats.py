"""What comes out of the pass beside the divergence."""

from typing import NamedTuple

from torch import Tensor

from opsd_kernels.rows import RowOutputs


class TokenStats(NamedTuple):
    """By-products of the same pass: (N,) fp32, unweighted, at the divergence's temperature, without gradient.

    With p = softmax(z_s / T) and q = softmax(z_t / T):

    student_entropy, teacher_entropy    -sum p ln p, -sum q ln q
    student_lse, teacher_lse            ln sum exp(z_s / T), ln sum exp(z_t / T)
    top1_agreement                      1 where the student's most likely token is one of the teacher's, else 0
    clip_fraction                       the student's probability mass on clipped vocabulary entries; 0 without a clip
    student_logprob, teacher_logprob    ln p, ln q of the sampled token; None without `tokens`. A negative token (an
                                        ignore index) gives 0, one beyond the vocabulary NaN
    full_divergence                     the divergence of the whole vocabulary, which the support approximates
    student_tail_mass, teacher_tail_mass    sum of p, of q, beyond the k tokens; all three None without a support

    Under a support everything is still of the whole vocabulary, but for clip_fraction: its outcomes are those compared.
    """

    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    top1_agreement: Tensor
    clip_fraction: Tensor
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    full_divergence: Tensor | None = None
    student_tail_mass: Tensor | None = None
    teacher_tail_mass: Tensor | None = None

    @classmethod
    def of(cls, out: RowOutputs, with_tokens: bool) -> "TokenStats":
        names = [name for name in out.names if name in cls._fields and (with_tokens or not name.endswith("logprob"))]
        return cls(**{name: out[name] for name in names})
