"""Published MER-UniBench scores, in percent: what a table of ours is printed beside.

All from OmniOPSD (arXiv 2606.15920), which gives its own scores per dataset and of the others the mean. Its baselines
are AffectGPT (2501.16566), AffectGPT-R1 (2508.01318) and Emotion-LLaMAv2 (2601.16449). The official
script reports the best checkpoint of each dataset, on labels that a Qwen2.5-7B-Instruct extracted.
"""

from __future__ import annotations

from typing import Final

PUBLISHED: Final[dict[str, dict[str, float]]] = {
    "AffectGPT": {"mean": 74.77},
    "Emotion-LLaMAv2": {"mean": 78.91},
    "AffectGPT-R1": {"mean": 79.48},
    "OmniOPSD, V+T": {"mean": 79.74},
    "OmniOPSD, A+T": {"mean": 80.81},
    "OmniOPSD, A+V+T": {
        "mer2023": 85.79,
        "mer2024": 92.43,
        "meld": 71.89,
        "iemocapfour": 89.09,
        "cmumosi": 90.06,
        "cmumosei": 89.03,
        "sims": 90.76,
        "simsv2": 89.14,
        "ovmerdplus": 59.52,
        "mean": 84.19,
    },
}
