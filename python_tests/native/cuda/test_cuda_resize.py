"""The CUDA resize: its table, the stub's answer, and its op on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ardlora_ext.native import dispatch, reference
from ardlora_ext.native.compiled import core


def test_table_checks_before_it_is_built() -> None:
    t = torch.zeros(2, 4)
    moves = np.array([[t.data_ptr(), t.data_ptr(), 16, 2, 0]], dtype=np.int64)
    with pytest.raises(ValueError, match="rank_resize: index must use each row once, got 1 twice"):
        core.cuda_resize_table(moves, [[1, 1]])
    words, jobs, blocks = core.cuda_resize_table(moves, [[1, 0]])
    assert (jobs, blocks) == (1, 1)
    assert len(words) == 7 + 3  # a job, and a swap by way of the held row


@pytest.mark.skipif(core.cuda_built(), reason="this build has CUDA kernels")
def test_a_build_without_kernels_says_so() -> None:
    with pytest.raises(NotImplementedError, match="rank_resize: tensors must be on the CPU, this build has no CUDA"):
        core.cuda_rank_resize(0, 0, 0, 0, 0)
    with pytest.raises(NotImplementedError, match="rank_resize: tensors must be on the CPU, this build has no CUDA"):
        dispatch.rank_resize(np.zeros((0, 5), np.int64), [], torch.device("cuda", 0))


def test_other_devices_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"rank_resize: tensors must be on the CPU.*, got meta"):
        dispatch.rank_resize(np.zeros((0, 5), np.int64), [], torch.device("meta"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device, or a torch without CUDA")
        if not core.cuda_built():
            pytest.skip("this build has no CUDA kernels")
    return torch.device(request.param)


@pytest.mark.parametrize("plan", [[2, 0, 1], [1, 2], [-1, 0, 1], [2, -1, 0], []])
@pytest.mark.parametrize("cols", [1, 37, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_move_in_place(device: torch.device, plan: list[int], cols: int, dtype: torch.dtype) -> None:
    old = torch.randn(3, cols).to(device, dtype)
    new = old.clone()
    moves = np.array([[new.data_ptr(), new.data_ptr(), cols * new.element_size(), 3, 0]], dtype=np.int64)
    dispatch.rank_resize(moves, [plan], device)()
    assert torch.equal(new[: len(plan)].cpu(), reference.rank_resize(old.cpu(), plan))
    assert torch.equal(new[len(plan) :], old[len(plan) :])
