"""The bed of a mixture of experts: what it deals out, and where ranks go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ardlora_ext.bench.quality.beds import experts
from ardlora_ext.bench.quality.methods import parse
from ardlora_ext.bench.quality.trial import run_trial


def test_rank_goes_to_experts_that_see_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDLORA_CACHE", str(tmp_path))
    bed = experts.ExpertsBed(tasks=4, experts=4, width=16, steps=60, batch=16, pretrain_steps=120, eval_rows=32)
    rows = experts.sequences(bed, 2, 5, torch.Generator().manual_seed(0))
    assert torch.equal(rows[:, :6].flip(1), rows[:, 7:])
    assert set((rows[:, :6] // 8).flatten().tolist()) == {2}
    seen = experts.tokens_seen(bed.task(0).model, rows)
    assert seen.sum(1).tolist() == [2.0 * 5 * 12] * 2
    monkeypatch.setattr(experts, "learn", None)  # from the cache now
    row = run_trial(bed, parse("ard"), 1e-2, seed=0)
    assert row["spearman"] > 0.0
    assert 0.25 < row["tokens"] < row["seeing"] + 0.5 <= 1.5
    assert row["params"] <= row["budget"]
