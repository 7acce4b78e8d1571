"""Wrap, unwrap, merge: which matrices become which units, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import config_from_dict
from ardlora_ext.layers.linear import LoraLinear

from helpers.adapters import fingerprint, scramble
from helpers.ard_runs import heads
from helpers.logits import assert_same_logits, logits
from helpers.models import ARCHITECTURES, Attention, Batch, llama, trainable

Architecture = tuple[nn.Module, Batch]

# Units of each matrix; {} is the layer. 4 heads of 8, LLaMA with 2 key-value heads, GPT-2 with q, k and v in one.
UNITS: dict[str, dict[str, tuple[str, int]]] = {
    "llama": {
        "model.layers.{}.self_attn.q_proj": ("out_heads", 4),
        "model.layers.{}.self_attn.k_proj": ("out_heads", 2),
        "model.layers.{}.self_attn.v_proj": ("out_heads", 2),
        "model.layers.{}.self_attn.o_proj": ("in_heads", 4),
        "model.layers.{}.mlp.gate_proj": ("matrix", 1),
        "model.layers.{}.mlp.up_proj": ("matrix", 1),
        "model.layers.{}.mlp.down_proj": ("matrix", 1),
    },
    "bert": {
        "bert.encoder.layer.{}.attention.self.query": ("out_heads", 4),
        "bert.encoder.layer.{}.attention.self.key": ("out_heads", 4),
        "bert.encoder.layer.{}.attention.self.value": ("out_heads", 4),
        "bert.encoder.layer.{}.attention.output.dense": ("in_heads", 4),
        "bert.encoder.layer.{}.intermediate.dense": ("matrix", 1),
        "bert.encoder.layer.{}.output.dense": ("matrix", 1),
        "bert.pooler.dense": ("matrix", 1),
    },
    "gpt2": {
        "transformer.h.{}.attn.c_attn": ("out_heads", 12),
        "transformer.h.{}.attn.c_proj": ("in_heads", 4),
        "transformer.h.{}.mlp.c_fc": ("matrix", 1),
        "transformer.h.{}.mlp.c_proj": ("matrix", 1),
    },
    "vit": {
        "vit.layers.{}.attention.q_proj": ("out_heads", 4),
        "vit.layers.{}.attention.k_proj": ("out_heads", 4),
        "vit.layers.{}.attention.v_proj": ("out_heads", 4),
        "vit.layers.{}.attention.o_proj": ("in_heads", 4),
        "vit.layers.{}.mlp.fc1": ("matrix", 1),
        "vit.layers.{}.mlp.fc2": ("matrix", 1),
    },
}


def kinds(model: nn.Module) -> dict[str, tuple[str, int]]:
    return {name: (layer.layout.kind, layer.layout.units) for name, layer in ard.adapters(model).items()}


def test_heads_are_found_from_the_transformers_config(architecture: Architecture) -> None:
    model, batch = architecture
    before = logits(model, batch)
    ard.wrap(model, heads(r0=2))
    expected = UNITS[model.config.model_type]
    assert kinds(model) == {pattern.format(i): units for pattern, units in expected.items() for i in range(2)}
    assert_same_logits(logits(model, batch), before)
    assert all(layer.ranks == [2] * layer.layout.units for layer in ard.adapters(model).values())


@pytest.mark.parametrize("granularity", ["matrix", "layer"])
def test_without_head_granularity_every_matrix_is_one_unit(granularity: str) -> None:
    model = ard.wrap(llama()[0], ard.ArdConfig(mode="paper", granularity=granularity))  # type: ignore[arg-type]
    assert set(kinds(model).values()) == {("matrix", 1)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, r".*_proj"),
        ({"target_modules": ["q_proj", "v_proj"]}, r".*\.[qv]_proj"),
        ({"target_modules": ["self_attn.q_proj"]}, r".*q_proj"),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, r"model\.layers\.1\.mlp\.up_proj"),
        ({"target_modules": r".*\.1\..*_proj"}, r"model\.layers\.1\..*"),
        ({"target_modules": ["lm_head"]}, r"lm_head"),
        ({"exclude_modules": ["down_proj", "layers.0.mlp.up_proj"]}, r"(?!.*(down|0\.mlp\.up)_proj).*_proj"),
        ({"exclude_modules": r".*\.0\..*"}, r"model\.layers\.1\..*"),
        ({"modules_to_save": ["layers.0"]}, r"model\.layers\.1\..*"),
    ],
)
def test_target_modules(options: dict[str, Any], expected: str) -> None:
    model = llama()[0]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ard.wrap(model, ard.LoraConfig(**options))
    assert list(ard.adapters(model)) == [name for name in linears if re.fullmatch(expected, name)]


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_base_is_frozen_and_classification_heads_train(name: str) -> None:
    model, batch = ARCHITECTURES[name]()
    ard.wrap(model, ard.LoraConfig())
    free = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert free == (set() if name == "llama" else {"classifier.weight", "classifier.bias"})
    model(**batch).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_modules_to_save() -> None:
    model = ard.wrap(llama()[0], ard.LoraConfig(modules_to_save=["norm", "layers.1.mlp"]))
    free = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    mlp = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert free == {"model.norm.weight"} | mlp
    assert not any(name.startswith("model.layers.1.mlp") for name in ard.adapters(model))


def test_unwrap_restores_everything(architecture: Architecture) -> None:
    model, _ = architecture
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    before = fingerprint(model)
    ard.wrap(model, heads())
    scramble(model)
    assert fingerprint(model) != before
    assert ard.unwrap(model) is model
    assert fingerprint(model) == before
    ard.wrap(model, ard.LoraConfig())


@pytest.mark.parametrize("factoring", ["shared", "independent"])
def test_merge_keeps_the_logits(architecture: Architecture, factoring: Any) -> None:
    model, batch = architecture
    before, base = fingerprint(model), logits(model, batch)
    ard.wrap(model, heads(r0=3, factoring=factoring))
    scramble(model)
    wrapped = logits(model, batch)
    assert (wrapped - base).abs().max() > 0.01 * base.abs().max(), "the adapters do something"
    assert_same_logits(logits(ard.merge(model), batch), wrapped)
    after = fingerprint(model)
    assert {key: after[key] for key in ("modules", "parameters")} == {
        key: before[key] for key in ("modules", "parameters")
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "merge: adapters must be finite, got NaN or Inf in 'down'"),
        (1e30, "merge: merged weight must be finite"),
    ],
)
def test_a_merge_that_fails_merges_nothing(value: float, message: str) -> None:
    model = ard.wrap(Attention(), ard.LoraConfig())
    scramble(model)
    for factor in ard.adapters(model)["down"].factors.values():
        factor.data.fill_(value)  # finite factors, a product that is not
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        ard.merge(model)
    assert fingerprint(model) == before


def test_a_tied_output_head_is_not_merged_into_the_embedding() -> None:
    model = ard.wrap(ARCHITECTURES["gpt2"]()[0], ard.LoraConfig(target_modules=["lm_head"]))
    scramble(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"merge: 'lm_head' must not share its weight with 'transformer\.wte'"):
        ard.merge(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_whole_and_independent(copier: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = llama()
    ard.wrap(model, heads(r0=3))
    ard.attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=10)
    scramble(model)
    clone, expected, before = copier(model), logits(model, batch), fingerprint(model)
    assert torch.equal(logits(clone, batch), expected)
    scramble(clone, seed=1)
    assert not torch.equal(logits(clone, batch), expected)
    assert fingerprint(model) == before
    clone(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("factoring", "live", "allocated"),
    [
        # rank 2, 4 heads of 8. q: A 2x32, B 8x8; o: A 8x8, B 2x32; up and down: 2x(32 + 64). Rows by 4, or by 8 above.
        ("shared", 128 + 128 + 192 + 192, 192 + 192 + 384 + 384),
        ("independent", 320 + 320 + 192 + 192, 320 + 320 + 384 + 384),
    ],
)
def test_parameters_report(factoring: Any, live: int, allocated: int) -> None:
    model = Attention()
    base = 2 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32)
    config = heads(r0=2, head_dim=8, factoring=factoring, modules_to_save=["up"])
    report = ard.parameters_report(ard.wrap(model, config))
    live, allocated = live - 192, allocated - 384
    assert (report.live, report.allocated) == (live, allocated)
    assert (report.trainable, report.total) == (live + 32 * 64 + 64, live + base)
    assert str(report).startswith(f"trainable params: {report.trainable:,} || all params: {report.total:,} ||")


@pytest.mark.parametrize("make", [ard.ElaConfig, ard.AdaConfig])
def test_parameters_report_counts_trained_gates(make: Any) -> None:
    model = ard.wrap(Attention(), make())
    report = ard.parameters_report(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    slack = report.allocated - report.live
    gates = sum(sum(layer.ranks) for layer in ard.adapters(model).values())
    factors = sum(layer.layout.parameters(layer.ranks) for layer in ard.adapters(model).values())
    assert report.live == report.trainable == factors + gates == trained - slack


@pytest.mark.parametrize("method", ["lora", "dora", "ard", "elalora", "adalora"])
def test_a_controller_counts_what_the_report_counts(method: str) -> None:
    model = ard.wrap(Attention(), config_from_dict({"method": method}))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = ard.attach(model, optimizer, total_steps=40)
    controller.finalize()
    assert controller.summary()["parameters"] == ard.parameters_report(model).live


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (None, [("matrix", 1)] * 4),
        (8, [("out_heads", 4), ("in_heads", 4), ("matrix", 1), ("matrix", 1)]),
        ({"q_proj": 16}, [("out_heads", 2), ("matrix", 1), ("matrix", 1), ("matrix", 1)]),
        ({"up": ("out", 16), "down": ("in", 8)}, [("matrix", 1), ("matrix", 1), ("out_heads", 4), ("in_heads", 8)]),
        ({"up": 32, "o_proj": 4}, [("matrix", 1), ("in_heads", 8), ("out_heads", 2), ("matrix", 1)]),
    ],
)
def test_head_dim_of_a_plain_module(head_dim: Any, expected: list[tuple[str, int]]) -> None:
    model = ard.wrap(Attention(), heads(r0=2, head_dim=head_dim))
    assert list(kinds(model).values()) == expected
    assert model(torch.randn(2, 3, 32)).shape == (2, 3, 32)


class Twice(nn.Module):
    """One linear layer under three names, two of them in one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.inner = nn.Sequential(nn.Tanh(), self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(self.again(self.first(x)))
        return out


def test_a_module_used_twice_gets_one_adapter_everywhere() -> None:
    model = Twice()
    before = fingerprint(model)
    ard.wrap(model, ard.LoraConfig(r=2))
    assert isinstance(model.first, LoraLinear)
    assert model.inner[1] is model.first
    assert model.again is model.first
    scramble(model)
    x = torch.randn(3, 8)
    expected = model(x)
    ard.merge(model)
    torch.testing.assert_close(model(x), expected)
    assert model.first is model.again is model.inner[1]
    assert fingerprint(model)["modules"] == before["modules"]


def test_multihead_attention_keeps_its_output_projection() -> None:
    with pytest.warns(UserWarning, match="no adapter covers 46 % .*'self_attn.in_proj_weight'"):
        model = ard.wrap(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), ard.LoraConfig(r=2))
    assert list(ard.adapters(model)) == ["linear1", "linear2"]


def test_start_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> object:
        torch.manual_seed(seed + 100)  # not what counts
        return {n: layer.lora_A.tolist() for n, layer in ard.adapters(_wrapped(ard.LoraConfig(seed=seed))).items()}

    assert start(1) == start(1)
    assert start(1) != start(2)


def _wrapped(config: AdapterConfig) -> nn.Module:
    return ard.wrap(Attention(), config)


def _meta() -> nn.Module:
    with torch.device("meta"):
        return Attention()


def _already_wrapped() -> nn.Module:
    return _wrapped(ard.LoraConfig())


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            Attention,
            ard.LoraConfig(target_modules=["q_prj"]),
            r"target_modules must match linear layers, got no match for 'q_prj'; near misses: .*q_proj.*; "
            r"linear layers are named: down, o_proj, q_proj, up",
        ),
        (Attention, ard.LoraConfig(target_modules=["q_proj", "nowhere"]), "got no match for 'nowhere'"),
        (lambda: llama()[0], ard.LoraConfig(target_modules="q_proj"), "no match for 'q_proj'; near misses: .*q_proj"),
        (lambda: nn.Sequential(nn.ReLU()), ard.LoraConfig(), "model must have linear layers, got Sequential without"),
        (lambda: nn.Linear(3, 3), ard.LoraConfig(), "model must have linear layers, got Linear without"),
        (_already_wrapped, ard.LoraConfig(), r"must not be wrapped already; call ardlora_ext\.unwrap\(model\) first"),
        (Attention, ard.LoraConfig(exclude_modules=".*"), "must leave something to adapt after exclude_modules"),
        (
            Attention,
            ard.LoraConfig(modules_to_save=["upp"]),
            r"modules_to_save must name modules of the model, got 'upp'; near misses: up",
        ),
        (Attention, heads(head_dim=5), "head_dim of 'q_proj' must divide its 32 output features, got 5; pass"),
        (Attention, heads(head_dim={"down": ("in", 9)}), "'down' must divide its 64 input features, got 9"),
        (Attention, heads(head_dim={"up": ("side", 8)}), "side of 'up' must be 'in' or 'out', got 'side'"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), heads(head_dim=4), "head_dim must match a layer, got 4"),
        (Attention, heads(head_dim={"q_proj": 8, "upp": 8}), "head_dim must match a layer, got 'upp'; near.*up"),
        (_meta, ard.LoraConfig(), r"parameters must be on the CPU.*, got 'q_proj' on meta"),
        (
            lambda: Attention().double(),
            ard.LoraConfig(),
            r"'q_proj' must be float32, bfloat16 or float16, got torch\.float64",
        ),
        # Rank 1: 64 + 64 + 96 + 96 parameters; rank 4: four times as many.
        (Attention, heads(r0=2, r_max=4, budget=319), r"between 320 parameters \(rank 1 .*\) and 1,280 "),
        (Attention, heads(r0=2, r_max=4, budget=1281), r"1,280 \(rank 4 everywhere\), got 1,281"),
    ],
    ids=[
        "near misses",
        "one of two",
        "name as a regex",
        "no linear layer",
        "linear layer itself",
        "wrapped",
        "all excluded",
        "modules_to_save",
        "head_dim",
        "head_dim of input",
        "head_dim side",
        "head_dim of no head",
        "head_dim of no layer",
        "meta",
        "float64",
        "budget too small",
        "budget too large",
    ],
)
def test_wrap_refuses_and_changes_nothing(make: Callable[[], nn.Module], config: AdapterConfig, message: str) -> None:
    model = make()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        ard.wrap(model, config)
    assert fingerprint(model) == before


@pytest.mark.parametrize("budget", [320, 1280])
def test_budgets_at_the_ends_of_the_range_are_taken(budget: int) -> None:
    ard.wrap(Attention(), heads(r0=2, r_max=4, budget=budget))


@pytest.mark.parametrize("call", [ard.unwrap, ard.merge, ard.parameters_report])
def test_only_wrapped_models_can_be_unwrapped(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ValueError, match=r"Attention must be wrapped: call ardlora_ext\.wrap\(model, config\) first"):
        call(Attention())
