"""`LoraLinear` on every path against plain torch in float64, and the memory it holds."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ardlora_ext.layers import spectra
from ardlora_ext.layers.linear import Capacity, Gate, LoraLinear
from ardlora_ext.layers.rows import capacity_of
from ardlora_ext.native import reference
from ardlora_ext.native.units import UnitLayout

from helpers.adapters import LAYOUTS, K, N, Scaled, every_layout, make_layer, scramble, set_ranks

CAPACITIES: tuple[Capacity, ...] = ("elastic", "fixed")
Run = dict[str, torch.Tensor]


def run(layer: LoraLinear, x: torch.Tensor, dy: torch.Tensor) -> Run:
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * dy).sum().backward()
    return {"y": y, "dx": x.grad, **{f"d_{name}": p.grad for name, p in layer.factors.items()}}  # type: ignore[dict-item]


def run_reference(layer: LoraLinear, x: torch.Tensor, dy: torch.Tensor) -> Run:
    """The same in plain torch, in float64."""
    weight = layer.base_layer.weight.detach().double()
    weight = weight if isinstance(layer.base_layer, Conv1D) else weight.T
    x = x.detach().double().requires_grad_()
    factors = {name: p.detach().double().requires_grad_() for name, p in layer.factors.items()}
    gate = factors["lora_E"].view(-1) if "lora_E" in factors else layer.gate
    a, b = factors["lora_A"], factors["lora_B"]
    delta = reference.lora_delta(layer.layout, layer.ranks, a, b, gate, layer.scaling)
    y = x @ (weight + delta.T) + layer.base_layer.bias.detach().double()
    (y * dy.double()).sum().backward()
    return {"y": y, "dx": x.grad, **{f"d_{name}": p.grad for name, p in factors.items()}}  # type: ignore[dict-item]


def assert_near(ours: Run, exact: Run, bound: float = 2e-6) -> None:
    """Compare each result with the float64 one, relative to its largest value."""
    for key, value in exact.items():
        assert ours[key].shape == value.shape, key
        if value.numel():
            error, scale = (ours[key].double() - value).abs().max().item(), value.abs().max().item()
            assert error <= bound * scale, f"{key}: {error / scale:.3g} > {bound:.3g}"


def test_sizes_are_called_as_in_nn_linear() -> None:
    layer = make_layer(LAYOUTS[0])
    assert (layer.in_features, layer.out_features) == (K, N)


@every_layout
@pytest.mark.parametrize("path", ["plain", "hooked", "subclass", "conv1d", "trainable"])
@pytest.mark.parametrize("gate", ["none", "controlled", "trained"])
def test_output_and_gradients(layout: UnitLayout, path: str, gate: Gate) -> None:
    layer = make_layer(layout, path, gate=gate)
    x, dy = torch.randn(3, 5, K), torch.randn(3, 5, N)
    assert_near(run(layer, x, dy), run_reference(layer, x, dy))
    if path == "trainable":
        torch.testing.assert_close(layer.base_layer.weight.grad, dy.reshape(-1, N).T @ x.reshape(-1, K))


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "1-D": lambda: torch.randn(K),
    "2-D": lambda: torch.randn(7, K),
    "4-D": lambda: torch.randn(2, 3, 4, K),
    "empty": lambda: torch.randn(0, K),
    "empty batch of sequences": lambda: torch.randn(2, 0, K),
    "columns of a wider tensor": lambda: torch.randn(7, 3 * K)[:, K : 2 * K],
    "transposed": lambda: torch.randn(K, 7).T,
    "sequence first": lambda: torch.randn(5, 3, K).transpose(0, 1),
    "expanded": lambda: torch.randn(1, K).expand(6, K),
    "every other row": lambda: torch.randn(9, K)[::2],
}


@pytest.mark.parametrize("path", ["plain", "hooked"])
@pytest.mark.parametrize("case", INPUTS)
def test_any_input_shape_and_layout(case: str, path: str) -> None:
    layer, x = make_layer(LAYOUTS[1], path), INPUTS[case]()
    dy = torch.randn(*x.shape[:-1], N)
    assert_near(run(layer, x, dy), run_reference(layer, x, dy))


@pytest.mark.parametrize("path", ["plain", "hooked"])
def test_expanded_output_gradient(path: str) -> None:
    layer, x, row = make_layer(LAYOUTS[2], path), torch.randn(6, K), torch.randn(N)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    (y.sum(0) @ row).backward()  # dy arrives with row stride 0
    ours = {"y": y, "dx": leaf.grad, "d_lora_A": layer.lora_A.grad, "d_lora_B": layer.lora_B.grad}
    assert_near(ours, run_reference(layer, x, row.expand(6, N)))  # type: ignore[arg-type]


@every_layout
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_bfloat16_model(layout: UnitLayout, adapter: torch.dtype) -> None:
    layer = make_layer(layout, dtype=torch.bfloat16)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(adapter), layer.lora_B.data.to(adapter)
    x, dy = torch.randn(9, K).bfloat16(), torch.randn(9, N).bfloat16()
    ours = run(layer, x, dy)
    assert (ours["y"].dtype, ours["d_lora_A"].dtype) == (torch.bfloat16, adapter)
    assert_near(ours, run_reference(layer, x, dy), 2e-2)


def test_autocast() -> None:
    layer, x, dy = make_layer(LAYOUTS[1]), torch.randn(9, K), torch.randn(9, N)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(layer, x, dy)
    assert (ours["y"].dtype, ours["dx"].dtype, ours["d_lora_A"].dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_near(ours, run_reference(layer, x, dy), 2e-2)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float16])
def test_usual_recipes_take_the_fused_node(
    compute: torch.dtype | None, weights: torch.dtype, x_dtype: torch.dtype
) -> None:
    """All of what torch can compute, that is: without autocast its own layer refuses mixed dtypes."""
    base = nn.Linear(K, N).to(weights).requires_grad_(False)
    layer = LoraLinear(copy.deepcopy(base), LAYOUTS[0], 3, 0.5)
    x = torch.randn(9, K).to(x_dtype).requires_grad_()
    context = nullcontext() if compute is None else torch.autocast("cpu", compute)
    if compute is None and weights != x_dtype:
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        return
    with context:
        y, plain = layer(x), base(x)
    assert type(y.grad_fn).__name__ == "_LoraLinearBackward"
    assert y.dtype == (compute or weights)
    assert torch.equal(y, plain)  # lora_B is zero
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad.dtype, layer.lora_A.grad.dtype) == (x_dtype, torch.float32)  # type: ignore[union-attr]


def test_float64_is_left_to_the_base_under_autocast() -> None:
    layer = LoraLinear(nn.Linear(K, N).double().requires_grad_(False), LAYOUTS[0], 3, 0.5)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((RuntimeError, ValueError), match=r"float64|dtype"):
        layer(torch.randn(2, K).double())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("path", ["plain", "hooked"])
def test_gradient_checkpointing(path: str, use_reentrant: bool) -> None:
    layer, x, dy = make_layer(LAYOUTS[2], path), torch.randn(9, K), torch.randn(9, N)
    expected = {key: value.clone() for key, value in run(layer, x, dy).items()}
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    (checkpoint(layer, leaf, use_reentrant=use_reentrant) * dy).sum().backward()
    for key, value in {"dx": leaf.grad, "d_lora_A": layer.lora_A.grad, "d_lora_B": layer.lora_B.grad}.items():
        assert value is not None
        assert torch.equal(value, expected[key]), key


def test_base_that_needs_its_own_output() -> None:
    base = Scaled(K, N).requires_grad_(False)
    layer = LoraLinear(base, LAYOUTS[0], 2, 0.7)
    scramble(layer)
    x = torch.randn(5, K, requires_grad=True)
    layer(x).sum().backward()
    ours, x.grad = x.grad, None
    (base(x) + x @ layer.get_delta_weight().T).sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_base_output_seen_by_a_hook_is_the_base_output() -> None:
    seen: list[torch.Tensor] = []
    layer = make_layer(LAYOUTS[0])
    layer.base_layer.register_forward_hook(lambda _module, _args, out: seen.append(out))
    x = torch.randn(5, K)
    layer(x)
    assert torch.equal(seen[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


@every_layout
def test_fold_and_singular_values_agree_with_the_dense_update(layout: UnitLayout) -> None:
    layer = make_layer(layout)
    delta, (a, b) = layer.get_delta_weight(), layer.fold()
    assert delta.shape == (N, K)
    torch.testing.assert_close(b @ a, delta)
    assert a.shape[0] == (max(layer.ranks) if layer.layout.shared else sum(layer.ranks))
    values = layer.singular_values()
    for u, (_, _, columns, rows) in enumerate(reference.unit_slices(layout, layer.ranks)):
        expected = torch.linalg.svdvals(delta[rows, columns].double())[: layer.ranks[u]]
        torch.testing.assert_close(values[u, : layer.ranks[u]], expected, rtol=0, atol=1e-4 * values.max().item())
        assert not values[u, layer.ranks[u] :].any()


@pytest.mark.parametrize("entries", [1, 1 << 22])  # one layer at a time, and all alike together
def test_singular_values_of_many_layers(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_ENTRIES", entries)
    gates: tuple[Gate, ...] = ("controlled", "trained", "none")
    layers = [make_layer(layout, gate=gate) for gate in gates for layout in (*LAYOUTS, *LAYOUTS)]
    draw = random.Random(0)
    for layer in layers:
        set_ranks(layer, lambda *_: draw.randint(0, 5))
        scramble(layer, seed=draw.randint(0, 99))
    values = spectra.singular_values(layers)
    assert values.shape == (sum(layer.layout.units for layer in layers), max(max(layer.ranks) for layer in layers))
    begin = 0
    for layer in layers:
        delta = layer.get_delta_weight().double()
        for (_, _, columns, rows), r in zip(reference.unit_slices(layer.layout, layer.ranks), layer.ranks, strict=True):
            expected = torch.linalg.svdvals(delta[rows, columns])[:r]
            torch.testing.assert_close(values[begin, :r], expected, rtol=0, atol=1e-4 * values.max().item())
            assert not values[begin, r:].any()
            begin += 1


def test_rank_zero_everywhere() -> None:
    layer, x = make_layer(LAYOUTS[1]), torch.randn(3, K)
    set_ranks(layer, lambda *_: 0)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.get_delta_weight().any()
    assert layer.singular_values().shape == (4, 0)
    assert layer.live_parameters == 0


@pytest.mark.parametrize("gate", ["controlled", "trained"])
def test_gates_stay_float32_bit_for_bit(gate: Gate) -> None:
    layer = make_layer(LAYOUTS[1], gate=gate)
    assert layer.gate is not None
    before = layer.gate.clone()
    layer.to(torch.bfloat16)
    assert (layer.lora_A.dtype, layer.gate.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(layer.gate, before)


@every_layout
def test_elastic_capacity_follows_the_ranks_and_fixed_does_not(layout: UnitLayout) -> None:
    def held(layer: LoraLinear) -> int:
        return sum(p.untyped_storage().nbytes() for p in layer.factors.values())

    elastic, fixed = (
        LoraLinear(nn.Linear(K, N), layout, 2, 1.0, max_rank=17, capacity=capacity) for capacity in CAPACITIES
    )
    full = fixed.max_rank
    sizes = []
    for rank in (full, 1, full, 0):
        for layer in (elastic, fixed):
            set_ranks(layer, lambda *_, rank=rank: rank)
        assert held(fixed) == 4 * layout.parameters([full] * layout.units)
        sizes.append(held(elastic))
    assert sizes[1] < sizes[0]
    assert sizes[1] < held(fixed)
    assert sizes[2] == sizes[0], "memory depends on the ranks, not on how they were reached"
    assert sizes[3] <= sizes[1]


def test_capacity_holds_the_live_rows_with_bounded_slack() -> None:
    sizes = [capacity_of(rows) for rows in range(200)]
    assert all(rows <= held < rows + 8 for rows, held in enumerate(sizes))
    assert sizes == sorted(sizes)
