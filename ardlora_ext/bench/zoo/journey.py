"""What a user does with a model, from wrap to merge, and whether every stage computes the same."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

import ardlora_ext as ard
from ardlora_ext.bench.zoo.inputs import Inputs, find_inputs, outputs
from ardlora_ext.bench.zoo.tiny import modality, tiny_models

PASS, REFUSED, FAIL, UNKNOWN = "pass", "refused", "FAIL", "not built"
_OURS = ("wrap: ", "attach: ", "save_pretrained: ")


class Outcome(NamedTuple):
    """What became of one architecture: one of `PASS`, `REFUSED`, `FAIL` and `UNKNOWN`, what was in it, and a word."""

    verdict: str
    modality: str
    inputs: str
    word: str


def travel(kind: str, config: ard.AdapterConfig | None = None) -> Outcome:
    """Take a model type through wrap, two steps, export, PEFT, reload and merge."""
    try:
        model, inputs = _usable(kind)
    except Exception as cause:  # of transformers' models and of guesses at their configs: any
        return Outcome(UNKNOWN, "-", "-", _said(cause))
    about = modality(model), "+".join(inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            word = _stages(model, inputs, ard.ArdConfig() if config is None else config)
        except Exception as cause:
            ours = isinstance(cause, ValueError) and str(cause).startswith(_OURS)
            return Outcome(REFUSED if ours else FAIL, *about, _said(cause))
    sentences = [str(w.message) for w in caught if str(w.message).startswith(_OURS)]
    told = "; ".join(dict.fromkeys(sentences))
    if word:
        peft = any("PEFT will compute something else" in sentence for sentence in sentences)
        return Outcome(REFUSED if peft else FAIL, *about, f"{word}; {told}")
    return Outcome(PASS, *about, told)


def _usable(kind: str) -> tuple[PreTrainedModel, Inputs]:
    """Return the smallest model of a type that can be called, and what with."""
    problem: Exception | None = None
    for model in tiny_models(kind):
        try:
            return model, find_inputs(model)
        except ValueError as cause:
            problem = problem or cause
    raise problem or ValueError("no config was tried")


def _stages(model: PreTrainedModel, inputs: Inputs, config: ard.AdapterConfig) -> str:
    """Return what differs from what it should be, or nothing."""
    bases = [copy.deepcopy(model) for _ in range(2)]
    before = compute(model, inputs)
    ard.wrap(model, config)
    if distance(compute(model, inputs), before) > 0.0:
        return "a wrapped model computes something else than its base"
    train(model, inputs)
    trained = compute(model, inputs)
    effect = distance(trained, before)
    if effect == 0.0:
        return "two steps of training changed nothing"
    with tempfile.TemporaryDirectory(prefix="ardlora-zoo-") as folder:
        ard.save_pretrained(model, folder)
        found = {
            "PEFT": compute(PeftModel.from_pretrained(bases[0], folder), inputs),
            "load_pretrained": compute(ard.load_pretrained(bases[1], folder), inputs),
        }
    found["merge"] = compute(ard.merge(model), inputs)
    size = max(float(value.abs().max()) for value in trained)
    wrong = [
        f"{name} differs by {gap:.1e} where training changed {effect:.1e}"
        for name, values in found.items()
        if not (gap := distance(values, trained)) <= 1e-5 * size + 1e-3 * effect
    ]
    return "; ".join(wrong)


def train(model: nn.Module, inputs: Inputs) -> None:
    """Take two steps towards smaller outputs."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ard.attach(model, optimizer, total_steps=2)
    for _ in range(2):
        torch.manual_seed(0)
        loss = torch.stack([value.float().square().mean() for value in outputs(model(**inputs))]).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def compute(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return what a model computes in eval mode; what it draws is the same each time."""
    torch.manual_seed(0)
    return outputs(model.eval()(**inputs))


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference; infinite where shapes differ."""
    if [value.shape for value in found] != [value.shape for value in expected]:
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def _said(cause: Exception) -> str:
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
