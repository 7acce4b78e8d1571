from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__version__: str

_Matrix = tuple[int, int, int, int, int]

class UnitTable:
    def __init__(
        self, kind: int, factoring: int, in_features: int, out_features: int, ranks: Sequence[int]
    ) -> None: ...
    @property
    def ranks(self) -> list[int]: ...
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
def lora_forward(
    table: UnitTable,
    x: _Matrix,
    lora_A: _Matrix,
    lora_B: _Matrix,
    gate: int,
    scaling: float,
    h: _Matrix,
    y: _Matrix,
    threads: int,
    dropout: float,
    seed: int,
) -> None: ...
def lora_backward(
    table: UnitTable,
    x: _Matrix,
    lora_A: _Matrix,
    lora_B: _Matrix,
    gate: int,
    scaling: float,
    h: _Matrix,
    dy: _Matrix,
    dh: _Matrix,
    dx: _Matrix,
    dA: _Matrix,
    dB: _Matrix,
    dgate: int,
    threads: int,
    dropout: float,
    seed: int,
) -> None: ...
def row_dots(blocks: NDArray[np.int64], dtype: int, threads: int) -> NDArray[np.float32]: ...
def rank_resize(moves: NDArray[np.int64], plans: Sequence[Sequence[int]], threads: int) -> None: ...
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
def cuda_built() -> bool: ...
def cuda_available() -> bool: ...
def cuda_resize_table(
    moves: NDArray[np.int64], plans: Sequence[Sequence[int]]
) -> tuple[NDArray[np.int64], int, int]: ...
def cuda_rank_resize(table: int, jobs: int, blocks: int, device: int, stream: int) -> None: ...
