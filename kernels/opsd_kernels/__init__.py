"""Token-level divergences between two language-model heads, without ever holding a [tokens, vocabulary] tensor."""

from opsd_kernels.divergence import Divergence, TopK
from opsd_kernels.fused_token_kl import fused_token_kl
from opsd_kernels.heads import Head, VocabShard
from opsd_kernels.stats import TokenStats

__all__ = ["Divergence", "Head", "TokenStats", "TopK", "VocabShard", "fused_token_kl"]
