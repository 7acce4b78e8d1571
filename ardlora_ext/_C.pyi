from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

_Matrix = tuple[int, int, int, int, int]  # address, rows, columns, row stride, dtype code
_Rows = tuple[int, int, int]  # address, columns, row stride

class UnitTable:
    def __init__(
        self, kind: int, factoring: int, in_features: int, out_features: int, ranks: Sequence[int]
    ) -> None: ...
    @property
    def ranks(self) -> list[int]: ...
    @property
    def units(self) -> int: ...
    @property
    def unit_begin(self) -> list[int]: ...
    @property
    def hidden(self) -> int: ...
    @property
    def gate_on_a(self) -> bool: ...
    @property
    def a_rows(self) -> int: ...
    @property
    def b_rows(self) -> int: ...
    @property
    def a_width(self) -> int: ...
    @property
    def b_width(self) -> int: ...

def shrink(
    table: UnitTable, is_a: bool, weight: _Matrix, row_scale: int, scale: float, x: _Matrix, h: _Matrix, threads: int
) -> None: ...
def expand(
    table: UnitTable, is_a: bool, weight: _Matrix, row_scale: int, scale: float, h: _Matrix, y: _Matrix, threads: int
) -> None: ...
def outer(
    table: UnitTable, is_a: bool, dw: _Matrix, row_scale: int, scale: float, h: _Matrix, x: _Matrix, threads: int
) -> None: ...

class LoraAdapter:
    def __init__(self, table: UnitTable, lora_A: _Matrix, lora_B: _Matrix, gate: int, scaling: float) -> None: ...

def lora_forward(
    adapter: LoraAdapter,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    y: _Rows,
    threads: int,
    dropout: float,
    seed: int,
) -> None: ...
def lora_backward(
    adapter: LoraAdapter,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    dy: _Rows,
    dh: int,  # 0: scratch of its own
    dx: _Rows,
    dA: int,
    dB: int,
    dgate: int,
    threads: int,
    dropout: float,
    seed: int,
) -> None: ...
def lora_grouped_forward(
    adapter: LoraAdapter,
    offsets: NDArray[np.int64],
    places: int,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    y: _Rows,
    threads: int,
    dropout: float,
    seed: int,
) -> None: ...
def lora_grouped_backward(
    adapter: LoraAdapter,
    offsets: NDArray[np.int64],
    places: int,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    dy: _Rows,
    dh: int,
    dx: _Rows,
    dA: int,
    dB: int,
    dgate: int,
    threads: int,
    dropout: float,
    seed: int,
) -> None: ...
def row_dots(blocks: NDArray[np.int64], dtype: int, threads: int) -> NDArray[np.float32]: ...
def importance(blocks: NDArray[np.int64], beta1: float, beta2: float, threads: int) -> bool: ...
def soft_orthogonality(blocks: NDArray[np.int64], strength: NDArray[np.float64], norm: bool, threads: int) -> None: ...
def orthogonal_rows(
    factors: NDArray[np.int64], kept: Sequence[Sequence[int]], norms: Sequence[float], threads: int
) -> None: ...
def draw_uniform(out: int, count: int, seed: int, threads: int) -> None: ...
def rank_resize(moves: NDArray[np.int64], plans: Sequence[Sequence[int]], threads: int) -> None: ...
def secant_slopes(
    dots: NDArray[np.float32],
    live: NDArray[np.int64],
    rho: NDArray[np.float64],
    spectrum: NDArray[np.float64],
    fisher: NDArray[np.float64],
    ema: float,
) -> NDArray[np.float64]: ...
def unit_costs(
    own: NDArray[np.float64], common: NDArray[np.float64], module_of: NDArray[np.int64], ranks: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]: ...
def prox_step(
    alpha: NDArray[np.float64],
    grad: NDArray[np.float64],
    weight: NDArray[np.float64],
    lo: NDArray[np.float64],
    hi: NDArray[np.float64],
    step: float,
    price: float,
    tv: float,
) -> None: ...
def set_gates(blocks: NDArray[np.int64], rho: NDArray[np.float64], kind: int, floor: float, width: float) -> None: ...
def active_isa() -> str: ...
def available_isas() -> list[str]: ...
def built_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def bench_kernel(
    table: UnitTable,
    op: str,
    is_a: bool,
    rows: int,
    activation: int,
    adapter: int,
    threads: int,
    repeats: int,
    dropout: float = 0.0,
    cold: bool = False,
) -> dict[str, Any]:
    """Time one operation of the active instruction set in C++, on random data of its own.

    Args:
        table: units, features and ranks.
        op: `shrink`, `expand` or `outer` of one factor; `forward` or `backward` of the whole adapter.
        is_a: the factor a primitive works on: lora_A (with x [rows, in_features]) or lora_B (with y or dy
            [rows, out_features]).
        rows: M, rows of the activations.
        activation: dtype code of x, y, dy and dx (`_native.DTYPE_CODES`).
        adapter: dtype code of the factors: float32 or that of the activations.
        threads: upper limit; small work stays on one thread.
        repeats: timed calls, after one that is not timed.
        dropout: p of the adapter's input, `forward` and `backward` only.
        cold: sweep the caches before each timed call; else the data stay where the call before left them.

    Returns:
        `seconds` [repeats], `flops` of one call (a multiply-add counts as two), `read_bytes` that one call must read
        and `update_bytes` that it must read and write (both count; h and gradients, only written, count once). A call
        cannot take less than max(flops / peak, read_bytes / read + update_bytes / update) of `bench_roofline`, with
        `bytes` = the bytes it touches for warm caches, or much more than the caches hold for `cold`.

    Raises:
        ValueError: the op is unknown, or a size or dtype does not fit.
    """

def bench_roofline(bytes: int, threads: int) -> dict[str, float]:
    """Measure what the machine can do at best under the active instruction set; takes about half a second.

    Args:
        bytes: working set of all threads together: what fits a cache is measured in it.
        threads: how many run at once.

    Returns:
        `read_gbs` of a pass that sums, `update_gbs` of a pass that adds in place (bytes read and written both count),
        `float32_gflops` and `bfloat16_gflops` of multiply-adds in registers (the latter with bf16 products where
        the instruction set has them, else the same as float32).
    """

def cuda_built() -> bool: ...
def cuda_problem(device: int) -> str:
    """Return what tensors must do instead of being on a CUDA device, or "" where kernels run; < 0: the current one."""

def cuda_overlap_launches(on: bool) -> bool:
    """Say whether a kernel of a call may begin before the one before it has ended; return what was before."""

def cuda_problem_of(driver: int, runtime: int, capability: int, has_code: bool) -> str:
    """Return the same from what a device and its driver say of themselves: 12040, 13000, 75."""

def cuda_resize_table(
    moves: NDArray[np.int64], plans: Sequence[Sequence[int]]
) -> tuple[NDArray[np.int64], int, int]: ...
def cuda_rank_resize(table: int, jobs: int, blocks: int, device: int, stream: int) -> None: ...
def cuda_row_table(factors: NDArray[np.int64]) -> tuple[NDArray[np.int64], int, int]: ...
def cuda_row_dots(table: int, jobs: int, rows: int, out: int, device: int, stream: int) -> None: ...
def cuda_importance(
    table: int,
    jobs: int,
    rows: int,
    beta1: float,
    beta2: float,
    workspace: int,
    score: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_set_gates(
    blocks: int, units: int, rho: int, kind: int, floor: float, width: float, device: int, stream: int
) -> None: ...
def cuda_segment_table(table: UnitTable) -> NDArray[np.int64]: ...
def cuda_gemm_plan(
    table: UnitTable, is_a: bool, kind: str, rows: int, dtype: int, dropout: bool, multiprocessors: int
) -> str: ...

class LoraPlans:
    """How the launches of one adapter's calls are cut."""

    workspace: int  # bytes

def cuda_lora_plans(table: UnitTable, rows: int, dtype: int, dropout: bool, device: int) -> LoraPlans: ...

# plans, segment table, workspace, its bytes, address of the seed or 0, device, stream
_Call = tuple[LoraPlans, int, int, int, int, int, int]

def cuda_lora_forward(
    adapter: LoraAdapter,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    y: _Rows,
    dropout: float,
    seed: int,
    call: _Call,
    fresh: bool,
    bias: int,
) -> None: ...
def cuda_lora_backward(
    adapter: LoraAdapter,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    dy: _Rows,
    dh: int,
    dx: _Rows,
    dA: int,
    dB: int,
    dgate: int,
    dropout: float,
    seed: int,
    call: _Call,
    fresh: bool,
) -> None: ...
def cuda_lora_grouped_forward(
    adapter: LoraAdapter,
    offsets: int,
    places: int,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    y: _Rows,
    dropout: float,
    seed: int,
    call: _Call,
) -> None: ...
def cuda_lora_grouped_backward(
    adapter: LoraAdapter,
    offsets: int,
    places: int,
    rows: int,
    dtype: int,
    x: _Rows,
    h: int,
    hidden: int,
    dy: _Rows,
    dh: int,
    dx: _Rows,
    dA: int,
    dB: int,
    dgate: int,
    dropout: float,
    seed: int,
    call: _Call,
) -> None: ...
