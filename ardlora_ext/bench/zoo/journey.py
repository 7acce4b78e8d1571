"""What a user does with a model, from wrap to merge, and whether every stage computes the same."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import ardlora_ext as ard
from ardlora_ext.bench.zoo.inputs import Inputs, find_inputs, outputs
from ardlora_ext.bench.zoo.tiny import modality, tiny_models

PASS, REFUSED, FAIL, UNKNOWN = "pass", "refused", "FAIL", "not built"
_OURS = ("wrap: ", "attach: ", "save_pretrained: ", "merge: ", "LoraExperts: ")
_NOT_OURS = ("PEFT adapts no such model", "too small to tell")
_LOAD_OURS = "load with ardlora_ext.load_pretrained"  # in what save_pretrained says of PEFT
_NOTHING = "two steps of training changed nothing"


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
            ours = str(cause).startswith(_OURS)
            return Outcome(REFUSED if ours else FAIL, *about, _said(cause))
    sentences = [str(w.message) for w in caught if str(w.message).startswith(_OURS)]
    told = "; ".join(dict.fromkeys(sentences))
    if not word or word.startswith(_NOT_OURS):
        return Outcome(PASS, *about, "; ".join(filter(None, (word, told))))
    expected = (word.startswith("PEFT") and _LOAD_OURS in told) or (word == _NOTHING and "no gradient reached" in told)
    return Outcome(REFUSED if expected else FAIL, *about, f"{word}; {told}")


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
    bases = [copy.deepcopy(model) for _ in range(3)]
    before = compute(model, inputs)
    size = max(float(value.abs().max()) for value in before)
    ard.wrap(model, config)
    if distance(compute(model, inputs), before) > 1e-6 * size:
        return "a wrapped model computes something else than its base"
    train(model, inputs)
    trained = compute(model, inputs)
    effect = distance(trained, before)
    if effect <= 1e-6 * size:
        moved = max((float(layer.lora_B.detach().abs().max()) for layer in ard.adapters(model).values()), default=0.0)
        return (
            "too small to tell: what was learned is lost in rounding" if 0 < moved < 1e-3 or size < 1e-9 else _NOTHING
        )
    with tempfile.TemporaryDirectory(prefix="ardlora-zoo-") as folder:
        ard.save_pretrained(model, folder)
        found = {"load_pretrained": compute(ard.load_pretrained(bases[1], folder), inputs)}
        try:
            found["PEFT"] = compute(PeftModel.from_pretrained(bases[0], folder), inputs)
        except Exception as cause:
            refusal = f"PEFT cannot load it: {_said(cause)}"
            return _peft_alone(bases[2], list(ard.adapters(model)), inputs) or refusal
    found["merge"] = compute(ard.merge(model), inputs)
    wrong = [
        f"{name} differs by {gap:.1e} where training changed {effect:.1e}"
        for name, values in sorted(found.items())
        if not (gap := distance(values, trained)) <= 1e-5 * size + 1e-3 * effect
    ]
    return "; ".join(wrong)


def _peft_alone(base: PreTrainedModel, names: list[str], inputs: Inputs) -> str:
    """Return what PEFT says when it makes adapters of its own for these layers, or nothing if it can."""
    try:
        compute(get_peft_model(base, LoraConfig(target_modules=names)), inputs)
    except Exception as cause:
        return f"PEFT adapts no such model: {_said(cause)}"
    return ""


def train(model: nn.Module, inputs: Inputs) -> None:
    """Take two steps towards smaller outputs; running statistics stay, as `wrap` advises."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = 0.0
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
