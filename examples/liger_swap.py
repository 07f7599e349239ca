"""Code written for LigerFusedLinearJSD, with one import changed: it then runs on a CPU too, with the same numbers.

python examples/liger_swap.py
"""

import torch

from opsd.integrations.liger import FusedLinearJSD as LigerFusedLinearJSD

torch.manual_seed(0)
tokens, width, vocabulary = 256, 128, 8_000
student_input = torch.randn(tokens, width, requires_grad=True)  # (N, D)
teacher_input = student_input.detach() + 0.2 * torch.randn(tokens, width)
student_head = torch.nn.Linear(width, vocabulary, bias=False)
teacher_head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
shift_labels = torch.randint(vocabulary, (tokens,))
shift_labels[:64] = -100  # a prompt

loss = LigerFusedLinearJSD(jsd_beta=0.5)(
    student_input, student_head.weight, teacher_input, teacher_head.weight, shift_labels
)
loss.backward()
print(f"JSD per token {loss.item():.4f}, head gradient norm {student_head.weight.grad.norm().item():.3e}")
