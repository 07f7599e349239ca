"""TRL's SDFT trainer without full logits: its `full_logits` objective, one mixin in front of the class.

pip install trl==1.16.*
python examples/trl_sdft.py PATH_OR_HUB_ID
"""

import sys

import torch
from datasets import Dataset
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from opsd.integrations.trl import FusedLossMixin


class FusedSDFTTrainer(FusedLossMixin, SDFTTrainer):
    """Everything of SDFTTrainer; the loss comes from hidden states."""


rows = [
    {
        "prompt": "Name the feeling: a low voice, eyes on the floor.",
        "privileged_context": "Both cues point to sadness.",
    },
    {"prompt": "Name the feeling: quick speech, a wide smile.", "privileged_context": "Both cues point to joy."},
]
config = SDFTConfig(
    output_dir="runs/trl_sdft",
    distillation_mode="full_logits",  # exact over the vocabulary; TRL's default is its top-100 approximation
    distillation_alpha=0.5,
    per_device_train_batch_size=2,
    num_generations=2,
    max_completion_length=32,
    max_steps=3,
    logging_steps=1,
    bf16=torch.cuda.is_available(),
    report_to="none",
)
FusedSDFTTrainer(sys.argv[1], args=config, train_dataset=Dataset.from_list(rows)).train()
