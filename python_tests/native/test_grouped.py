"""Experts' adapters on rows sorted by expert: values and gradients against the plain-torch reference in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ardlora_ext.native import reference
from ardlora_ext.native.compiled import core
from ardlora_ext.native.grouped import Base, lora_grouped
from ardlora_ext.native.units import UnitLayout

K, N = 45, 70
SHAPES = [  # rows of each expert, their ranks
    ([1], [3]),
    ([0, 1, 0], [2, 0, 1]),
    ([3, 0, 17, 9], [0, 1, 5, 8]),
    ([64, 1, 30, 0, 33], [1, 1, 1, 4, 2]),
    ([2048, 700, 0, 1300, 48], [8, 3, 16, 1, 0]),
]


def setup(
    rows: Sequence[int], ranks: Sequence[int], dtype: torch.dtype = torch.float32, spare: int = 0
) -> tuple[UnitLayout, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(len(rows))
    layout = UnitLayout("experts", "independent", len(ranks), K, N)
    live = sum(ranks)
    offsets = torch.tensor([0, *rows]).cumsum(0)
    x = torch.randn(sum(rows) + spare, K).to(dtype)
    factors = [torch.randn(live + 2, K), torch.randn(live + 2, N), torch.rand(live + 2)]
    return layout, offsets, x, factors


def wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("rows", "ranks"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_equal_the_reference(rows: list[int], ranks: list[int], transposed: bool, isa: str) -> None:
    layout, offsets, x, factors = setup(rows, ranks)
    stack = torch.randn(len(ranks), K, N) if transposed else torch.randn(len(ranks), N, K).mT
    base = Base(lambda rows, w: torch.cat([rows[a:b] @ m for a, b, m in zip(offsets, offsets[1:], w)]), stack)  # noqa: B905
    leaves = [t.clone().requires_grad_() for t in (x, *factors)]
    y = lora_grouped(leaves[0], base, offsets, *leaves[1:], layout.encode(ranks), 0.5)
    weight = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, weight)
    exact = wide([x, *factors])
    expected = reference.lora_grouped(layout, ranks, exact[0], offsets.tolist(), *exact[1:], 0.5)
    expected = expected + base.product(exact[0], stack.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    for got, want in zip(grads, torch.autograd.grad(expected, exact, weight.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * (1 + float(want.abs().max())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype, isa: str) -> None:
    rows, ranks = SHAPES[3]
    layout, offsets, x, factors = setup(rows, ranks, dtype)
    leaves = [t.clone().requires_grad_() for t in (x, *factors)]
    y = lora_grouped(leaves[0], None, offsets, *leaves[1:], layout.encode(ranks), 0.5)
    grads = torch.autograd.grad(y.float().sum(), leaves)
    exact = wide([x, *factors])
    expected = reference.lora_grouped(layout, ranks, exact[0], offsets.tolist(), *exact[1:], 0.5)
    bound = 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound * float(expected.detach().abs().max()))
    for got, want in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * float(want.abs().max()))


def test_rows_of_no_expert_stay_and_get_no_gradient() -> None:
    rows, ranks = SHAPES[2]
    layout, offsets, x, factors = setup(rows, ranks, spare=5)
    x.requires_grad_()
    y = lora_grouped(x, None, offsets, *factors, layout.encode(ranks), 1.0)
    y.sum().backward()
    assert x.grad is not None
    assert not y[-5:].any()
    assert not x.grad[-5:].any()
    assert y[-6].any()


def test_an_expert_without_rows_gets_zeros_not_what_was_in_memory() -> None:
    layout, offsets, x, factors = setup([5, 0, 4], [2, 3, 1])
    a, b, gate = (f.requires_grad_() for f in factors)
    lora_grouped(x, None, offsets, a, b, gate, layout.encode([2, 3, 1]), 1.0).sum().backward()
    for grad in (a.grad, b.grad, gate.grad):
        assert grad is not None
        assert not grad[2:5].any()
        assert not grad[6:].any()  # past the live rows
        assert grad[5].any()


def test_bitwise_the_same_on_any_number_of_threads() -> None:
    rows, ranks = SHAPES[4]
    layout, offsets, x, factors = setup(rows, ranks)
    before = torch.get_num_threads()

    def run(count: int) -> list[torch.Tensor]:
        torch.set_num_threads(count)
        leaves = [t.clone().requires_grad_() for t in (x, *factors)]
        seed = torch.tensor(7)
        y = lora_grouped(leaves[0], None, offsets, *leaves[1:], layout.encode(ranks), 0.5, (0.25, seed))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    try:
        first, *others = [run(count) for count in (1, 2, 3, 8)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "places", [None, [12, 4, 0, 9, 3, 7, 2**32 - 1, 5, 70000, 8, 2, 6, 1]], ids=["order", "tokens"]
)
def test_dropout_is_the_mask_of_the_places(places: list[int] | None, isa: str) -> None:
    rows, ranks = [7, 0, 6], [2, 1, 3]
    layout, offsets, x, factors = setup(rows, ranks)
    keep = reference.dropout_factors(0.3, 11, places or len(x), K).float()
    leaves = [t.clone().requires_grad_() for t in (x, *factors)]
    table, at = layout.encode(ranks), None if places is None else torch.tensor(places)
    y = lora_grouped(leaves[0], None, offsets, *leaves[1:], table, 0.5, (0.3, torch.tensor(11)), at)
    masked = [t.clone().requires_grad_() for t in (x, *factors)]
    want = lora_grouped(masked[0] * keep, None, offsets, *masked[1:], table, 0.5)
    torch.testing.assert_close(y, want)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), masked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 2, 5], "offsets must ascend, got 3 before 2"),
        ([0, 3, 4, 6], "offsets must be at most the 5 rows of x, got 6"),
        ([1, 3, 4, 5], "offsets must begin at 0, got 1"),
        ([0, 5], "offsets must have 4 entries, one more than there are experts, got 2"),
    ],
)
def test_offsets_are_checked(offsets: list[int], message: str) -> None:
    layout, _, x, factors = setup([5], [1, 1, 1])
    with pytest.raises(ValueError, match=message):
        lora_grouped(x, None, torch.tensor(offsets), *factors, layout.encode([1, 1, 1]), 1.0)


def test_other_arguments_are_checked() -> None:
    layout, offsets, x, (a, b, gate) = setup([5], [2])
    table = layout.encode([2])
    with pytest.raises(ValueError, match=r"offsets must be contiguous int64, got torch\.int32"):
        lora_grouped(x, None, offsets.int(), a, b, gate, table, 1.0)
    with pytest.raises(ValueError, match=r"places must be int64 \[5\] on cpu, got torch\.int64 \[4\] on cpu"):
        lora_grouped(x, None, offsets, a, b, gate, table, 1.0, places=torch.arange(4))
    with pytest.raises(ValueError, match="gate must have at least 2 entries, got 1"):
        lora_grouped(x, None, offsets, a, b, gate[:1], table, 1.0)
    with pytest.raises(ValueError, match="must be contiguous"):
        lora_grouped(x, None, offsets, a.T.contiguous().T, b, gate, table, 1.0)
    matrix = UnitLayout("matrix", "independent", 1, K, N).encode([2])
    with pytest.raises(ValueError, match="table must be of experts, got kind 0"):
        lora_grouped(x, None, offsets, a, b, gate, matrix, 1.0)
    with pytest.raises(NotImplementedError, match="must be on the CPU"):
        lora_grouped(x.to("meta"), None, offsets, a, b, gate, table, 1.0)


def test_a_pass_that_knows_no_groups_refuses_experts() -> None:
    layout = UnitLayout("experts", "independent", 2, 4, 6)
    adapter = core.LoraAdapter(layout.table([1, 1]), *[(0, 0, 4, 4, 0)] * 2, 0, 1.0)
    with pytest.raises(ValueError, match="table must not be of experts, got 2 experts"):
        core.lora_forward(adapter, 0, 0, (0, 4, 4), 0, 2, (0, 6, 6), 1, 0.0, 0)
