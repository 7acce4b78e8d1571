"""`bench kernels --device cuda`: what it computes from its times, and what it says without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ardlora_ext.bench.cli import main
from ardlora_ext.bench.speed import kernels_cuda
from ardlora_ext.bench.speed.kernels_cuda import IMPLEMENTATIONS, measure, notes


class Clock:
    """Runs the call and answers with 10, 20, 30 ... us in turn."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Callable[[], None]) -> float:
        call()
        self.calls += 1
        return 1e-5 * self.calls


@pytest.mark.parametrize(
    ("pattern", "impl"),
    [
        ("uniform-8", IMPLEMENTATIONS[:4]),
        ("heads-shared", IMPLEMENTATIONS[:5]),
        ("experts-skewed", ("base", "ours", "peft", "torch-loop", "torch-grouped_mm")),
    ],
)
def test_rows_hold_times_above_the_base(pattern: str, impl: tuple[str, ...]) -> None:
    names = len(impl)
    clock = Clock()
    rows = measure(pattern, "float32", 4, 128, 1, torch.device("cpu"), clock)
    assert clock.calls == 2 * names  # one round of each pass
    forward = [row for row in rows if row["pass"] == "forward"]
    assert [row["impl"] for row in forward] == list(impl)
    assert [row["us"] for row in forward] == pytest.approx([10.0 * (i + 1) for i in range(names)])
    assert [row["adapter_us"] for row in forward] == pytest.approx([10.0 * i for i in range(names)])
    assert forward[1]["overhead"] == pytest.approx(1.0)
    assert f"{pattern} 128 4 float32 forward: adapter 2.00 x as fast as peft" in notes(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--device", "cuda"]) == 2
    assert "--device cuda must have a CUDA device and a torch with CUDA" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch without CUDA")
def test_on_a_device() -> None:
    device = torch.device("cuda", 0)
    rows = measure("uniform-8", "bfloat16", 64, 128, 3, device, kernels_cuda.EventClock(device))
    assert all(row["us"] > 0 for row in rows)
