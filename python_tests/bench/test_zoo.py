"""The journey from wrap to merge on a seeded sample of transformers' architectures, each modality among them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from ardlora_ext.bench.cli import main
from ardlora_ext.bench.zoo.journey import FAIL, PASS, UNKNOWN, travel
from ardlora_ext.bench.zoo.tiny import architectures
from ardlora_ext.layers.linear import LoraLinear

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = {
    "text": ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "vision": ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION"),
    "audio": ("CTC", "AUDIO_CLASSIFICATION", "SPEECH_SEQ_2_SEQ"),
    "multimodal": ("IMAGE_TEXT_TO_TEXT",),
}


@pytest.mark.parametrize("modality", TASKS)
def test_a_sample_of_every_modality(modality: str) -> None:
    known = architectures()
    kinds = {k for task in TASKS[modality] for k in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")}
    drawn = random.Random(5).sample(sorted(kinds & known.keys()), min(12, len(kinds & known.keys())))
    passed: list[str] = []
    for kind in drawn:
        outcome = travel(kind)
        assert outcome.verdict != FAIL, f"{kind}: {outcome.word}"
        passed += [outcome.modality] * (outcome.verdict == PASS)
        if passed.count(modality) == 3:
            return
    pytest.fail(f"only {passed} of {drawn} passed")


@pytest.mark.parametrize("broken", ["fold", "merge_terms"])
def test_a_difference_is_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = getattr(LoraLinear, broken)

    def wrong(self: LoraLinear) -> Any:
        with torch.no_grad():
            self.lora_B.mul_(1.5)
        return own(self)

    monkeypatch.setattr(LoraLinear, broken, wrong)
    outcome = travel("llama")
    assert outcome.verdict == FAIL
    assert "differs by" in outcome.word


def test_what_cannot_be_built_is_not_called_passed() -> None:
    assert travel("timm_wrapper").verdict == UNKNOWN


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--types", "llama", "resnet", "--seconds", "100", "--all"]) == 0
    out = capsys.readouterr().out
    assert "1 pass, 1 refused, 0 FAIL, 0 not built of 2" in out
    assert main(["zoo", "--types", "lama"]) == 2
