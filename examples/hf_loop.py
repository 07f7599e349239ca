"""On-policy self-distillation of any Hugging Face causal model in a loop of your own, the fused loss included.

The teacher is the student itself with its adapter off, reading a prompt that also holds a rationale.

    python examples/hf_loop.py                 # a tiny random model, three steps
    python examples/hf_loop.py PATH_OR_HUB_ID
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from opsd import Divergence
from opsd.integrations.hf import distillation_loss

torch.manual_seed(0)
if len(sys.argv) > 1:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config)
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

question = torch.randint(3, base.config.vocab_size, (4, 12))  # your tokenizer's ids: what the student is asked
rationale = torch.randint(3, base.config.vocab_size, (4, 20))  # what only the teacher may read

for step in range(3):
    asked = model.generate(input_ids=question, max_new_tokens=16, min_new_tokens=16, do_sample=True, pad_token_id=0)
    response = asked[:, question.shape[1] :]
    told = torch.cat([rationale, question, response], dim=1)  # the same response after the teacher's prompt
    loss = distillation_loss(
        model,
        {"input_ids": asked},
        torch.arange(asked.shape[1]).expand_as(asked) >= question.shape[1],
        {"input_ids": told},
        torch.arange(told.shape[1]).expand_as(told) >= told.shape[1] - response.shape[1],
        divergence=Divergence("jsd", beta=0.5),
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: JSD per token {loss.item():.4f}")
