"""LoraExperts: every family, every path of its base, the same as dense weights that hold the updates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ardlora_ext as ard
from ardlora_ext.layers.adapted_weight import AdaptedWeight, Call
from ardlora_ext.layers.expert_stacks import expert_stacks
from ardlora_ext.layers.experts import ExpertStack, LoraExperts
from ardlora_ext.layers.routing import Routing
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply

from helpers.experts import FAMILIES, ExpertBed, StackedExperts, tiny_experts, tokens

PATHS = ("grouped_mm", "eager", "batched_mm")


def stacks_of(model: nn.Module) -> dict[str, ExpertStack]:
    return {name: layer for name, layer in ard.adapters(model).items() if isinstance(layer, ExpertStack)}


def randomise(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in ard.adapters(model).values():
            for factor, rows in zip((layer.lora_A, layer.lora_B), layer.layout.rows(layer.ranks), strict=True):
                factor[:rows] = 0.2 * torch.randn(rows, factor.shape[1])


def ragged(model: nn.Module) -> None:
    """Ranks 0, 1, 2, 3 ... of the experts."""
    updates = {}
    for name, layer in stacks_of(model).items():
        wanted = [e % 4 for e in range(layer.layout.units)]
        pairs = zip(layer.ranks, wanted, strict=True)
        updates[name] = tuple(UnitUpdate(tuple(range(min(r, w))), max(w - r, 0)) for r, w in pairs)
    apply(model, RankUpdate(updates))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_experts_factors_move_and_the_merged_model_is_the_same(family: str) -> None:
    model = tiny_experts(family)
    ids = tokens(8, 48)
    before = model(input_ids=ids).logits.detach()
    ard.wrap(model, ard.LoraConfig(r=2))
    stacks = stacks_of(model)
    assert len(stacks) >= 4
    assert torch.equal(model(input_ids=ids).logits, before)
    randomise(model)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, stack in stacks.items():
        for factor in (stack.lora_A, stack.lora_B):
            assert factor.grad is not None
            each = factor.grad[: sum(stack.ranks)].unflatten(0, (stack.layout.units, -1)).abs().amax(dim=(1, 2))
            assert (each > 0).all(), f"{family}: experts of {name} that got no gradient: {each}"
    adapted = model(input_ids=ids).logits.detach()
    assert (adapted - before).abs().max() > 1e-2
    merged = ard.merge(model)
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)


def dense_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the factors by autograd through dense weights, in float64."""
    plain = copy.deepcopy(model)
    stacks = stacks_of(plain)
    leaves, updates = {}, {}
    for name, stack in stacks.items():
        a, b = stack.lora_A.detach().double().requires_grad_(), stack.lora_B.detach().double().requires_grad_()
        leaves |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        parts = zip(a[: sum(stack.ranks)].split(stack.ranks), b[: sum(stack.ranks)].split(stack.ranks), strict=True)
        update = torch.stack([stack.scaling * right.T @ left for left, right in parts])
        updates[name] = stack.placed(update)
    ard.unwrap(plain)
    plain = plain.double()
    plain.set_experts_implementation("eager")  # grouped_mm has no float64
    weights = {name: plain.get_parameter(name).detach() + update for name, update in updates.items()}
    loss = torch.func.functional_call(plain, weights, (), {"input_ids": ids, "labels": ids}).loss
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_of_ragged_ranks_are_those_of_dense_weights(family: str, path: str) -> None:
    model = tiny_experts(family)
    model.set_experts_implementation(path)
    ard.wrap(model, ard.LoraConfig(r=3, lora_alpha=3, target_modules=["experts"]))
    ragged(model)
    randomise(model)
    ids = tokens(2, 16)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    exact, grads = dense_gradients(model, ids)
    torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-5, atol=1e-6)
    for name, stack in stacks_of(model).items():
        for factor in ("lora_A", "lora_B"):
            got, want = getattr(stack, factor).grad, grads[f"{name}.{factor}"]
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_routing_weights_get_their_gradient() -> None:
    model = tiny_experts("mixtral")
    ard.wrap(model, ard.LoraConfig(r=2))
    randomise(model)
    router = model.model.layers[0].mlp.gate.weight
    router.requires_grad_(True)
    ids = tokens(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    merged = ard.merge(copy.deepcopy(model))
    other = merged.model.layers[0].mlp.gate.weight.requires_grad_(True)
    other.grad = None
    merged(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(router.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_paths_agree_in_gates_and_lower_precision() -> None:
    ids = tokens(2, 16)
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for path in PATHS:
            model = tiny_experts("gpt_oss").to(dtype)
            model.set_experts_implementation(path)
            ard.wrap(model, ard.ElaConfig(r=3))
            randomise(model)
            with torch.no_grad():
                for layer in ard.adapters(model).values():
                    assert layer.lora_E is not None
                    layer.lora_E.fill_(0.5)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            gates = [layer.lora_E.grad for layer in stacks_of(model).values() if layer.lora_E is not None]
            found.append([loss.detach().float(), *gates])
        bound = 1e-4 if dtype == torch.float32 else 0.3
        for others in found[1:]:
            for got, want in zip(others, found[0], strict=True):
                assert got is not None
                torch.testing.assert_close(got, want, rtol=bound, atol=bound * float(want.abs().max()))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_checkpointing_recomputes_the_same_with_dropout() -> None:
    ids = tokens(2, 16)
    grads = []
    for path in ("grouped_mm", "eager"):
        for checkpointing in (False, True):
            model = tiny_experts("mixtral").train()
            model.set_experts_implementation(path)
            ard.wrap(model, ard.LoraConfig(r=2, lora_dropout=0.3))
            randomise(model)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                model.enable_input_require_grads()
            torch.manual_seed(9)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            grads.append([stack.lora_A.grad for stack in stacks_of(model).values()])
    for plain, again in (grads[:2], grads[2:]):
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_the_types_of_the_base() -> None:
    ids = tokens(2, 16)
    for path in ("grouped_mm", "eager"):
        model = tiny_experts("mixtral")
        model.set_experts_implementation(path)
        ard.wrap(model, ard.LoraConfig(r=2))
        randomise(model)
        exact = model(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, labels=ids)
            logits.loss.backward()
        torch.testing.assert_close(logits.logits.float(), exact, rtol=0.1, atol=0.1)
        assert all(stack.lora_B.grad is not None for stack in stacks_of(model).values())


def test_compiled_models_break_their_graph_at_experts() -> None:
    bed = ExpertBed((1, 1), (5, 3))
    ard.wrap(bed, ard.LoraConfig(r=2))
    randomise(bed)
    x = torch.randn(8, 24)
    expected = bed.experts(x, (5, 3))
    compiled = torch.compile(bed.experts, backend="eager")
    torch.testing.assert_close(compiled(x, (5, 3)), expected)


def test_a_module_looks_like_its_base_and_comes_back() -> None:
    model = tiny_experts("gpt_oss")
    bases = [layer.mlp.experts for layer in model.model.layers]
    names = dict(model.named_parameters()).keys()
    ard.wrap(model, ard.LoraConfig(r=2))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, LoraExperts)
    assert experts.base_layer is bases[0]
    assert experts.num_experts == 4
    assert experts.down_proj_bias is bases[0].down_proj_bias
    with pytest.raises(AttributeError, match="'GptOssExperts' object has no attribute 'nothing'"):
        experts.nothing  # noqa: B018
    assert copy.deepcopy(model)(input_ids=tokens()).logits.shape[-1] == 96
    ard.unwrap(model)
    assert [layer.mlp.experts for layer in model.model.layers] == bases
    assert dict(model.named_parameters()).keys() == names


def test_merged_for_a_while() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_experts("gpt_oss").to(dtype)
        before = {name: p.clone() for name, p in model.named_parameters()}
        ard.wrap(model, ard.LoraConfig(r=2))
        randomise(model)
        ids = tokens(2, 8)
        adapted = model(input_ids=ids).logits
        ard.merge_adapter(model)
        bound = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=bound, atol=bound)
        ard.unmerge_adapter(model)
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
        ard.unwrap(model)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_named_adapters_and_references() -> None:
    model = tiny_experts("mixtral")
    ids = tokens(2, 8)
    base = model(input_ids=ids).logits
    ard.wrap(model, ard.LoraConfig(r=2), "one")
    randomise(model)
    first = model(input_ids=ids).logits
    frozen = ard.frozen_copy(model)
    others = {"target_modules": ["down_proj"], "exclude_modules": ["gate_up_proj"]}
    ard.add_adapter(model, "two", ard.LoraConfig(r=3, **others))
    with torch.no_grad(), ard.disable_adapter(model):
        assert torch.equal(model(input_ids=ids).logits, base)
    with pytest.raises(ValueError, match="adapters must be of linear layers, got experts in 'one'"):
        ard.add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "both")
    ard.set_adapter(model, "two")
    assert set(stacks_of(model)) == {f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)}
    assert torch.equal(model(input_ids=ids).logits, base)
    ard.set_adapter(model, "one")
    for again in (model, frozen):
        assert torch.equal(again(input_ids=ids).logits, first)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_dropout_follows_the_token_on_every_path(family: str) -> None:
    ids, found = tokens(2, 16), []
    for path in PATHS:
        model = tiny_experts(family).train()
        model.set_experts_implementation(path)
        ard.wrap(model, ard.LoraConfig(r=3, target_modules=["experts"], lora_dropout=0.4))
        ragged(model)
        randomise(model)
        torch.manual_seed(9)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(stack.lora_A.grad for stack in stacks_of(model).values())])
    assert not torch.equal(model.eval()(input_ids=ids, labels=ids).loss, found[0][0])
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            assert got is not None
            assert want is not None
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_whose_tokens_are_not_known_have_masks_by_their_order() -> None:
    bed = ard.wrap(ExpertBed((1, 1, 1), (5, 0, 3)), ard.LoraConfig(r=2, lora_dropout=0.5)).train()
    randomise(bed)
    stack, x = stacks_of(bed)["experts.weight"], torch.randn(8, 24)
    torch.manual_seed(4)
    y = bed.experts(x, (5, 0, 3))
    torch.manual_seed(4)
    weight = AdaptedWeight(stack, Call(stack, Routing([])))
    each = [F.linear(rows, weight[e]) for e, rows in enumerate(x.split([5, 0, 3]))]
    torch.testing.assert_close(torch.cat(each), y)


class Odd(StackedExperts):
    """Uses its weight in a product that adapters cannot follow, or the other way round."""

    use = "einsum"

    def forward(self, x: torch.Tensor, counts: Any = None) -> torch.Tensor:
        if self.use == "einsum":
            return torch.einsum("mk,enk->men", x, self.weight).sum(1)
        if self.use == "transposed":
            return x @ self.weight[0]
        if self.use == "float":
            return F.linear(x.float(), self.weight[0].float())
        return F.linear(x, getattr(self.weight[0], self.use)())


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("einsum", "Odd must use 'weight' in products that adapters can follow, got einsum"),
        ("transposed", r"got a use of it as the transpose of \[experts, out, in\]"),
        ("abs", r"Odd must use 'weight' in products that adapters can follow, got \.abs"),
        ("double", r"Odd must use 'weight' in products that adapters can follow, got \.double"),
    ],
)
def test_what_adapters_cannot_follow_is_never_passed_over(use: str, message: str) -> None:
    model = nn.Sequential(Odd(3, 8))
    model[0].use = use
    ard.wrap(model, ard.LoraConfig(r=2, target_modules=["weight"]))
    with pytest.raises((TypeError, AttributeError), match=message):
        model(torch.randn(4, 8))
    assert model[0].base_layer.weight is model[0].base_layer._parameters["weight"]  # nothing stays in its place


def test_a_cast_to_the_dtype_that_is_there_is_followed() -> None:
    model, x = nn.Sequential(Odd(3, 8)), torch.randn(4, 8)
    model[0].use = "float"
    ard.wrap(model, ard.LoraConfig(r=2, target_modules=["weight"]))
    layer = next(iter(ard.adapters(model).values()))
    nn.init.normal_(layer.lora_B)
    weight = model[0].base_layer.weight[0] + layer.get_delta_weight()[0]
    torch.testing.assert_close(model(x), F.linear(x, weight))


def test_structure_tells_the_axes() -> None:
    found = {}
    for family in ("mixtral", "gpt_oss", "llama4_text", "jetmoe"):
        stacks = expert_stacks(tiny_experts(family))
        found[family] = {(s.transposed, s.in_features, s.out_features) for s in stacks.values()}
        assert {s.experts for s in stacks.values()} == {4}
    assert found["mixtral"] == {(False, 32, 80), (False, 40, 32)}
    assert found["gpt_oss"] == {(True, 32, 80), (True, 40, 32)}
    assert found["llama4_text"] == {(True, 32, 80), (True, 40, 32)}
    assert not expert_stacks(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4)))
