"""How a launch of the CUDA kernels is cut: what the host decides, without a device."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ardlora_ext.native.compiled import core

A100 = (108, 164 * 1024)
SMALLEST_BLOCK = 99 * 1024  # bytes of shared memory that a block may have on every architecture of the fat binary
TABLE = re.compile(
    r"(?P<kind>\w+): blocks (?P<x>\d+) x (?P<y>\d+) x (?P<z>\d+) of (?P<threads>\d+) threads, (?P<shared>\d+) bytes "
    r"shared, rank tile (?P<tile>\d+), shares (?P<shares>\d+) of (?P<share>\d+), workspace (?P<workspace>\d+) bytes"
)


def plan(
    kind: str,
    ranks: list[int],
    rows: int,
    width: int = 4096,
    dtype: int = 1,
    dropout: bool = False,
    device: tuple[int, int] = A100,
) -> dict[str, int]:
    """Plan for factor A of a matrix, or of B where there are several ranks, one a head."""
    heads = len(ranks) > 1
    table = core.UnitTable(1 if heads else 0, 0, width, width, ranks)
    text = core.cuda_gemm_plan(table, not heads, kind, rows, dtype, dropout, device)
    found = TABLE.fullmatch(text)
    assert found is not None, text
    assert found["kind"] == kind
    return {name: int(value) for name, value in found.groupdict().items() if name != "kind"}


@given(
    kind=st.sampled_from(["shrink", "outer", "outer_shrink"]),
    rank=st.integers(1, 300),
    rows=st.integers(1, 100_000),
    width=st.sampled_from([8, 100, 1024, 4096, 50257]),
    dtype=st.sampled_from([0, 1, 2]),
    multiprocessors=st.sampled_from([1, 8, 54, 108, 132]),
    shared=st.sampled_from([64, 100, 164, 228]),
)
def test_shares_cover_the_sum_once(
    kind: str, rank: int, rows: int, width: int, dtype: int, multiprocessors: int, shared: int
) -> None:
    if kind == "outer_shrink":
        rank, dtype = min(rank, 16), max(dtype, 1)
    p = plan(kind, [rank], rows, width, dtype, device=(multiprocessors, shared * 1024))
    panel = 32 if dtype == 0 else 64
    length = -(-width // panel) if kind == "shrink" else rows
    assert p["share"] * (p["shares"] - 1) < length <= p["share"] * p["shares"]
    assert p["z"] == p["shares"]
    assert p["shares"] == 1 or p["x"] * p["y"] * p["z"] <= 9 * multiprocessors


@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("kind", ["shrink", "expand", "outer"])
@pytest.mark.parametrize("rank", [1, 16, 64, 512])
def test_blocks_fit_on_every_architecture(kind: str, rank: int, dtype: int) -> None:
    assert plan(kind, [rank], 4096, dtype=dtype, dropout=True)["shared"] <= SMALLEST_BLOCK


@pytest.mark.parametrize("kind", ["shrink", "outer"])
def test_few_tiles_are_divided_and_many_are_not(kind: str) -> None:
    assert plan(kind, [8], 2048)["shares"] > 1
    assert plan(kind, [8], 65536, width=65536)["shares"] == 1


@pytest.mark.parametrize(
    ("rank", "rows", "dtype", "wide"),
    [
        (65, 2048, 1, True),
        (232, 2048, 2, True),
        (64, 2048, 1, False),
        (128, 1024, 1, False),  # too few rows to pay for a prepared factor
        (128, 2048, 0, False),  # float32
    ],
)
def test_wide_blocks_are_for_many_ranks_and_rows(rank: int, rows: int, dtype: int, wide: bool) -> None:
    shrink, expand = plan("shrink", [rank], rows, dtype=dtype), plan("expand", [rank], rows, dtype=dtype)
    assert (shrink["tile"], shrink["threads"]) == ((128, 256) if wide else (64, 128))
    prepared = rank * 4096 * 2 if wide else 0
    assert expand["workspace"] == prepared
    sums = shrink["shares"] * rows * -(-rank // 8) * 8 * 4 if shrink["shares"] > 1 else 0
    assert shrink["workspace"] == sums + prepared
    for p in (shrink, expand, plan("expand", [rank], rows, dtype=dtype, dropout=True)):
        assert p["shared"] <= SMALLEST_BLOCK


def test_a_tile_of_outer_has_room_for_the_columns_before_a_head() -> None:
    assert plan("outer", [16] * 8, 512)["tile"] == 16
    assert plan("outer", [7] + [16] * 7, 512)["tile"] == 32  # heads begin at 7, 23, ...


@given(
    ranks=st.lists(st.integers(0, 70), min_size=1, max_size=300).filter(any),
    rows=st.integers(1, 100_000),
    skew=st.floats(0.0, 1.0),
    multiprocessors=st.sampled_from([1, 8, 108]),
)
def test_blocks_of_sorted_rows_are_enough_for_any_offsets(
    ranks: list[int], rows: int, skew: float, multiprocessors: int
) -> None:
    """One expert has `skew` of all rows, the others as many as each other."""
    table = core.UnitTable(3, 0, 1024, 512, ranks)
    live = sum(r > 0 for r in ranks)
    first = round(skew * rows)
    each = [first if e == 0 else (rows - first) // max(len(ranks) - 1, 1) for e in range(len(ranks))]
    for kind in ("shrink", "expand", "outer"):
        text = core.cuda_gemm_plan(table, True, kind, rows, 1, False, (multiprocessors, 164 * 1024))
        found = TABLE.fullmatch(text)
        assert found is not None, text
        p = {name: int(value) for name, value in found.groupdict().items() if name != "kind"}
        length = p["share"] if kind == "outer" else 128
        blocks = [-(-n // length) for n, r in zip(each, ranks, strict=True) if r > 0]
        if kind == "outer":
            divided = sum(n for n in blocks if n > 1)
            assert p["z"] >= sum(max(n, 1) for n in blocks)
            assert divided <= (p["shares"] if p["shares"] > 1 else 0)
            assert p["z"] <= rows // length + live
        else:
            assert rows // 128 + live >= p["x"] >= sum(blocks)


def test_nothing_to_do_is_no_launch() -> None:
    for ranks, rows in (([0], 512), ([8], 0), ([0, 0], 512)):
        for kind in ("shrink", "expand", "outer"):
            p = plan(kind, ranks, rows)
            assert p["x"] * p["y"] * p["z"] == 0
            assert p["workspace"] == 0
