"""A trained student in plain transformers and peft: `python examples/quickstart/answer.py RUN_DIR ROWS.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

run_dir, rows = Path(sys.argv[1]), Path(sys.argv[2])
config = yaml.safe_load((run_dir / "config.yaml").read_text())
base, adapter = config["model"]["path"], run_dir / "checkpoints" / "last"
assert AutoConfig.from_pretrained(base).model_type == "qwen2_5_omni_thinker", "another family has another class"
model = PeftModel.from_pretrained(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(base), adapter)

try:
    processor = AutoProcessor.from_pretrained(base)
except ImportError:  # transformers' own wants torchvision, for videos
    from opsd.processing import load_processor

    processor = load_processor(base)
row = json.loads(rows.open().readline())
row["prompt"][-1]["content"].append({"type": "text", "text": f'\nSubtitle: "{row["subtitle"]}"'})
text = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
picture = Image.open(rows.parent / row["prompt"][-1]["content"][0]["image"])
size = {"shortest_edge": config["media"]["min_pixels"], "longest_edge": config["media"]["max_pixels"]}
inputs = processor(text=[text], images=[picture], images_kwargs={"size": size}, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=28)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer)[0], "| truth:", row["label"])
