"""`fused_token_kl` in a loop of your own: two models that share a vocabulary, no [tokens, vocabulary] tensor.

python examples/plain_loop.py
"""

import torch

from opsd import Divergence, fused_token_kl

torch.manual_seed(0)
tokens, width, vocabulary = 512, 256, 32_000
student_hidden = torch.randn(tokens, width, requires_grad=True)  # (N, D) last hidden states of the response tokens
teacher_hidden = student_hidden.detach() + 0.1 * torch.randn(tokens, width)  # (N, D) the same tokens, other prompt
head = torch.nn.Parameter(torch.randn(vocabulary, width) / width**0.5, requires_grad=False)  # (V, D), shared

divergence = fused_token_kl(student_hidden, head, teacher_hidden, divergence=Divergence("jsd", beta=0.5))  # (N,) fp32
loss = divergence.mean()
loss.backward()
print(f"JSD per token {loss.item():.4f}, gradient norm {student_hidden.grad.norm().item():.3e}")
