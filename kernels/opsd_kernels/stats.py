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
    """

    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    top1_agreement: Tensor
    clip_fraction: Tensor
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None

    @classmethod
    def of(cls, out: RowOutputs, with_tokens: bool) -> "TokenStats":
        return cls(**{name: out[name] for name in cls._fields if with_tokens or not name.endswith("logprob")})
