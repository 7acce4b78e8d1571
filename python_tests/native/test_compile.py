"""torch.library contracts of the ops; torch.compile of wrapped models: one graph, whatever the ranks do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import ardlora_ext as ard
from ardlora_ext.model.record import adapters
from ardlora_ext.native import ops
from ardlora_ext.native.units import UnitKind, UnitLayout
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply

from helpers.models import Batch

LAYOUTS: list[tuple[UnitKind, list[int]]] = [("matrix", [5]), ("out_heads", [2, 0, 3, 1]), ("in_heads", [3, 1, 0, 2])]


def arguments(kind: UnitKind, ranks: list[int], dtype: torch.dtype, p: float) -> tuple[list[Any], list[Any]]:
    """Return the arguments of `lora_linear` and of `lora_accumulate`; rows past the live ones are there, too."""
    layout = UnitLayout(kind, "shared", len(ranks), 24, 16)
    a_rows, b_rows = layout.rows(ranks)
    x = torch.randn(2, 3, 24, dtype=dtype, requires_grad=True)
    y = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    a = torch.randn(a_rows + 1, layout.a_width, requires_grad=True)
    b = torch.randn(b_rows + 2, layout.b_width, requires_grad=True)
    gate = torch.rand(sum(ranks) + 1, requires_grad=True)
    adapter = [a, b, gate, layout.encode(ranks), 0.5, p, torch.tensor(7) if p else None]
    return [x, torch.randn(16, 24, dtype=dtype), torch.randn(16, dtype=dtype), *adapter], [y, x, *adapter]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "ranks"), LAYOUTS)
def test_opcheck(kind: UnitKind, ranks: list[int], dtype: torch.dtype, p: float) -> None:
    linear, accumulate = arguments(kind, ranks, dtype, p)
    names = torch.ops.ardlora_ext
    torch.library.opcheck(names.lora_linear.default, linear)
    torch.library.opcheck(names.lora_accumulate.default, accumulate)
    detached = [v.detach() if isinstance(v, torch.Tensor) else v for v in linear]
    x, weight, _, *adapter = detached
    y, h = names.lora_linear.default(*detached)
    for need in (False, True):
        torch.library.opcheck(
            names.lora_backward.default, [torch.randn_like(y), x, h, *adapter, weight if need else None, need, need]
        )


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch does not split compiled graphs")
def test_compiled_cuda_graphs_leave_the_ops_out() -> None:
    """A replay would use the ranks of the capture, and its dropout, without a word."""
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    linear, accumulate = arguments("matrix", [5], torch.float32, 0.25)

    def step(given: list[Any], others: list[Any]) -> torch.Tensor:
        y, _ = torch.ops.ardlora_ext.lora_linear.default(*given)
        z, _ = torch.ops.ardlora_ext.lora_accumulate.default(*others)
        loss = y.sum() + z.sum()
        return torch.autograd.grad(loss, given[3])[0]

    nodes = make_fx(step, pre_dispatch=False)(linear, accumulate).graph.nodes
    ours = [node for node in nodes if "ardlora_ext" in str(node.target)]
    assert {str(node.target).split(".")[1] for node in ours} >= {"lora_linear", "lora_accumulate", "lora_backward"}
    assert all(map(is_cudagraph_unsafe_fx_node, ours))


def test_ops_know_their_shapes_without_data() -> None:
    linear, _ = arguments("out_heads", [2, 1], torch.bfloat16, 0.0)
    x, weight, _, a, b, *_ = (v.to("meta") if isinstance(v, torch.Tensor) else v for v in linear)
    y = ops.lora_linear(x, weight, None, a, b, None, linear[6], 1.0)
    assert y.shape == (2, 3, 16)
    assert y.dtype == torch.bfloat16


def make_bert(dropout: float = 0.0) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    off = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    told = {
        "vocab_size": 80,
        "num_labels": 3,
        "problem_type": "single_label_classification",
    }  # else guessed, and guarded
    return BertForSequenceClassification(BertConfig(**sizes, **off, **told))


def make_llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=80, use_cache=False)
    return LlamaForCausalLM(config)


def batch(kind: str) -> Batch:
    tokens = torch.randint(80, (2, 7))
    labels = tokens if kind == "llama" else torch.randint(3, (2,))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": make_bert, "llama": make_llama}


def move_ranks(model: nn.Module, step: int) -> None:
    """Give every unit another rank, 0 and the largest included."""
    modules = {}
    for name, layer in adapters(model).items():
        wanted = [(step * (u + 1)) % (layer.max_rank + 1) for u in range(layer.layout.units)]
        units = [UnitUpdate(tuple(range(min(r, w))), max(w - r, 0)) for r, w in zip(layer.ranks, wanted, strict=True)]
        modules[name] = tuple(units)
    apply(model, RankUpdate(modules, seed=step))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "config",
    [ard.ArdConfig(mode="paper", granularity="head", r0=2, r_max=4, capacity="fixed"), ard.LoraConfig(r=3)],
    ids=["ard", "lora"],
)
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_equals_eager_and_rank_changes_do_not_recompile(kind: str, config: Any) -> None:
    """`aot_eager`: all of dynamo and AOT autograd, without the C++ that inductor would compile for a minute."""
    torch._dynamo.reset()
    model = ard.wrap(MODELS[kind](), config).train()
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    changes = 50 if isinstance(config, ard.ArdConfig) else 0
    for step in range(changes + 1):
        inputs = batch(kind)
        model.zero_grad()
        eager = model(**inputs).loss
        eager.backward()
        expected = gradients(model)
        model.zero_grad()
        loss = compiled(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, eager, rtol=1e-6, atol=1e-6)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7)
        if step < changes:
            move_ranks(model, step)
            for layer in adapters(model).values():
                assert layer.lora_gate is not None
                layer.lora_gate[: sum(layer.ranks)] = 0.5
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "config",
    [
        ard.ArdConfig(
            mode="paper", granularity="head", r0=2, r_max=4, capacity="fixed", update_interval=2, lr_alpha=0.1
        ),
        ard.ElaConfig(r=3, r_max=6, capacity="fixed", deltaT=4, b=2, grace=0, tinit=2, tfinal=6),
        ard.AdaConfig(init_r=4, target_r=2, capacity="fixed", removal=True, deltaT=4, tinit=2, tfinal=6),
    ],
    ids=["ard", "elalora", "adalora"],
)
def test_compiled_training_takes_the_same_decisions(config: Any) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    model = make_bert()
    batches = [batch("bert") for _ in range(30)]
    histories, weights = [], []
    for compiled in (False, True):
        own = ard.wrap(copy.deepcopy(model), config).train()
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
        controller = ard.attach(own, optimizer, total_steps=len(batches))
        step = torch.compile(own, fullgraph=True, backend=counter) if compiled else own
        history = []
        for inputs in batches:
            step(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(controller.ranks())
        histories.append(history)
        weights.append(own.state_dict())
    assert histories[0] == histories[1]
    assert histories[0][0] != histories[0][-1], "ranks moved"
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


def test_dropout_in_a_compiled_layer_follows_torchs_generator() -> None:
    torch._dynamo.reset()
    model = ard.wrap(nn.Sequential(nn.Linear(32, 32)), ard.LoraConfig(r=4, lora_dropout=0.5)).train()
    nn.init.ones_(next(iter(adapters(model).values())).lora_B)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 32)
    outputs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        outputs.append(compiled(x))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    torch.manual_seed(1)
    assert torch.equal(model(x), outputs[0])
