"""Attention of decoded tokens against its definition: lengths, masks, and rows that see nothing."""

from __future__ import annotations

import pytest
import torch

from opsd import decode_attention
from opsd.decode_attention import Seen, attend_rows

ROWS, WIDTH, HEADS, KEY_HEADS, D, CAPACITY, USED = 4, 3, 4, 2, 8, 7, 5
LENGTHS = torch.tensor([1, 5, 3, 4])


def definition(q, k, v, allowed, scale):
    """fp64, one softmax a query under an explicit mask (n, L or 1, keys); 0 and -inf where it allows nothing."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    group = HEADS // KEY_HEADS
    scores = scale * q @ k.repeat_interleave(group, 1).mT
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    out = scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(group, 1)
    return out.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("choice", ["auto", "dense"])
@pytest.mark.parametrize("masked", [False, True], ids=["lengths", "mask"])
def test_a_row_sees_what_it_may_and_nothing_else(choice, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, WIDTH, HEADS, D, generator=generator)
    k, v = (torch.randn(ROWS, CAPACITY, KEY_HEADS, D, generator=generator) for _ in range(2))
    k[:, USED:], v[:, USED:] = torch.nan, torch.nan  # room that no row has come to
    mask = torch.rand(ROWS, WIDTH, USED, generator=generator) < 0.5 if masked else None
    if mask is not None:
        mask[1, 2], mask[2] = False, False  # a window has left all behind
    seen = Seen(LENGTHS, USED, mask)
    out, lse = attend_rows(q, k, v, seen, 0.3, choice)
    allowed = mask if mask is not None else torch.arange(USED) < LENGTHS[:, None, None]
    want, want_lse = definition(q, k[:, :USED], v[:, :USED], allowed, 0.3)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice, runs", [("auto", False), ("flash", False), ("dense", True)])
def test_the_choice_of_the_config_is_what_runs(choice, runs, monkeypatch):
    ran, plain = [], decode_attention._dense
    monkeypatch.setattr(decode_attention, "_dense", lambda *a: ran.append(1) or plain(*a))
    q, k = torch.randn(4, 1, HEADS, D), torch.randn(4, USED, KEY_HEADS, D)
    attend_rows(q, k, k, Seen(LENGTHS, USED), 0.3, choice)
    assert bool(ran) == runs
