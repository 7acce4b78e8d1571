"""Fixtures: every instruction set this CPU runs, seeds, small models of each architecture, tiny model folders."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from ardlora_ext.native.compiled import core

from helpers.models import ARCHITECTURES, Batch
from helpers.tiny_models import decoder, encoder, reviews  # noqa: F401

ISAS = core.built_isas()


def pytest_configure() -> None:
    """Share the cores between the processes of `pytest -n`, and with what their tests start."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one instruction set and check that it is the active one."""
    if request.param not in core.available_isas():
        pytest.skip(f"this CPU cannot run {request.param}")
    core.set_isa(request.param)
    assert core.active_isa() == request.param
    yield request.param
    core.set_isa("")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> tuple[nn.Module, Batch]:
    """A small random model of each architecture in eval mode (no dropout), and a batch for it."""
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[request.param]()
    return model.eval(), batch


@pytest.fixture
def one_process() -> Iterator[None]:
    """Let Accelerate forget what a test told it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
