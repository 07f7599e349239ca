"""A run's fast paths against their plain twins, by one flag of the config each: the same answers, losses and weights.

That of the teacher's cache is in tests/test_teacher_cache.py, that of the features in tests/test_features.py. Graphs
are captured on CUDA alone (tests/test_cuda_engine.py).
"""

from __future__ import annotations

import pytest
import torch

from opsd.train import train
from tests.jobs import text_job
from tests.test_resume import metrics, weights

TWINS = {
    "shared prefix": "engine.share_prefix=false",
    "graphs": "rollout.graphs=false",
    "slots": "rollout.slots=2",
    "attention": "engine.attention=dense",
}
NAMES = ("loss", "grad_norm", "response_length", "accuracy", "format")


def ran(folder, name, *words):
    """Metrics, weights, and what was answered."""
    own = (f"train.run_dir={folder / name}", "train.steps=3", "log.samples_every=1", "teacher.kind=frozen")
    run = train(text_job(folder, *own, *words))
    texts = [record["response"] for record in run.directory.read("samples")]
    return metrics(folder / name), weights(folder / name), texts


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    return folder, ran(folder, "fast")


@pytest.mark.parametrize("twin", TWINS)
def test_a_run_on_the_plain_twin_learns_the_same(fast, twin):
    folder, (records, learnt, texts) = fast
    found, weights_found, texts_found = ran(folder, twin.replace(" ", "-"), TWINS[twin])
    assert texts_found == texts
    for ours, theirs in zip(found, records, strict=True):
        for name in NAMES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name, tensor in learnt.items():
        torch.testing.assert_close(weights_found[name], tensor, rtol=1e-4, atol=1e-5)
