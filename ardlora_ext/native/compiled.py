"""Load the compiled core and turn tensors into the integers it takes.

The core knows nothing of torch: a matrix is `(address, rows, columns, row stride in elements, dtype code)`.
"""

from __future__ import annotations

import torch  # first: the core then shares torch's own OpenMP runtime

try:
    from ardlora_ext import _C as core
except ImportError as cause:
    raise ImportError(
        "ardlora_ext: the compiled core `_C` could not be loaded; build it with `pip install .` "
        f"from the project's root ({cause})"
    ) from cause

__all__ = ["DTYPE_CODES", "NO_MATRIX", "VERSION", "Matrix", "as_rows", "core", "matrix", "threads"]

Matrix = tuple[int, int, int, int, int]

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

NO_MATRIX: Matrix = (0, 0, 0, 0, 0)

VERSION = "0.1.0"  # of the package

if core.__version__ != VERSION:
    raise ImportError(
        f"ardlora_ext: the compiled core must be version {VERSION}, got {core.__version__}; run `pip install .` again"
    )


def matrix(t: torch.Tensor) -> Matrix:
    """Describe a 2-D tensor [rows, cols] whose rows are contiguous."""
    rows, cols = t.shape
    return (t.data_ptr(), rows, cols, t.stride(0), DTYPE_CODES[t.dtype])


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """View [..., features] as [M, features] with contiguous rows; copies only when the layout allows no view."""
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    if flat.is_contiguous():
        return flat
    row, column = flat.stride()
    rows_fit = column == 1 and (flat.shape[0] <= 1 or row >= flat.shape[1])
    return flat if rows_fit else flat.clone(memory_format=torch.contiguous_format)


def threads() -> int:
    """Return the thread count torch is set to."""
    return torch.get_num_threads()
