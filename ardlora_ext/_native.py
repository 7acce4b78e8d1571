"""Load the compiled core and turn tensors into the integers it takes.

The core knows nothing of torch: a matrix is `(address, rows, columns, row stride in elements, dtype code)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch  # first: the core then shares torch's own OpenMP runtime
from numpy.typing import NDArray

try:
    from ardlora_ext import _C as core
except ImportError as cause:
    raise ImportError(
        "ardlora_ext: the compiled core `_C` could not be loaded; build it with `pip install .` "
        f"from the project's root ({cause})"
    ) from cause

__all__ = ["DTYPE_CODES", "NO_MATRIX", "Matrix", "core", "matrix", "rank_resize", "threads"]

Matrix = tuple[int, int, int, int, int]

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_MATRIX: Matrix = (0, 0, 0, 0, 0)

_VERSION = "0.1.0"

if core.__version__ != _VERSION:
    raise ImportError(
        f"ardlora_ext: the compiled core must be version {_VERSION}, got {core.__version__}; run `pip install .` again"
    )


def matrix(t: torch.Tensor) -> Matrix:
    """Describe a 2-D tensor [rows, cols] whose rows are contiguous."""
    rows, cols = t.shape
    return (t.data_ptr(), rows, cols, t.stride(0), DTYPE_CODES[t.dtype])


def threads() -> int:
    """Return the thread count torch is set to."""
    return torch.get_num_threads()


def rank_resize(moves: NDArray[np.int64], plans: Sequence[Sequence[int]], device: torch.device) -> None:
    """Move rows of many buffers of one device in one call.

    Args:
        moves: [n, 5] int64: source address, destination address, bytes per row, source rows, plan.
        plans: for each row of a destination the source row, or -1 for zeros.
        device: where the buffers are. On CUDA the launch goes to torch's current stream.

    Raises:
        NotImplementedError: the build has no kernels for the device.
        ValueError: a move or plan does not fit; nothing moved.
    """
    if device.type == "cpu":
        core.rank_resize(moves, plans, threads())
        return
    if device.type != "cuda":
        raise NotImplementedError(f"rank_resize: tensors must be on the CPU or a CUDA device, got {device}")
    if not core.cuda_built():
        raise NotImplementedError(
            f"rank_resize: tensors must be on the CPU, this build has no CUDA kernels, got {device}"
        )
    words, jobs, blocks = core.cuda_resize_table(moves, plans)
    table = torch.from_numpy(words).to(device)  # of the current stream, so torch reuses it only after the launch
    index = table.device.index
    core.cuda_rank_resize(table.data_ptr(), jobs, blocks, index, torch.cuda.current_stream(index).cuda_stream)
