"""Run a function in several processes that share a gloo group, on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ardlora_ext import processes

# A server that has imported what tests need and started no thread: its forks are cheap and safe.
_context = multiprocessing.get_context("forkserver")
_models = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "bert", "gpt2", "vit")]
_context.set_forkserver_preload(["ardlora_ext", "torch.distributed.fsdp", "accelerate", "pytest", *_models])


def run(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `work(rank, *args)` returns in each of `size` processes.

    Raises:
        AssertionError: one of them raised; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'store')}"
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _context.Process(target=_main, args=(pipe[1], store, rank, size, work, args), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        outcomes = [_receive(reader) for reader, _ in pipes]
        for process in processes:
            process.join()
    failures = [text for ok, text in outcomes if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


def run_script(size: int, script: Path) -> list[tuple[str, int, int]]:
    """Run a script as `torchrun --nproc-per-node size` and `accelerate launch --cpu` do, in its folder.

    Returns:
        What each process prints, how many times all of them compared their decisions, and how often DDP ran.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return run(size, _script, size, script, port)


def _script(rank: int, size: int, script: Path, port: int) -> tuple[str, int, int]:
    dist.destroy_process_group()  # the script makes its own
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.chdir(script.parent)
    compared = forwards = 0
    agree, forward = processes.agree, DistributedDataParallel.forward

    def forwarded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return forward(module, *args, **kwargs)

    def counted(*args: Any) -> None:
        nonlocal compared
        agree(*args)
        compared += dist.get_world_size() == size

    with redirect_stdout(StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "agree", counted)
        patch.setattr(DistributedDataParallel, "forward", forwarded)
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue(), compared, forwards


def _receive(reader: Connection) -> tuple[bool, Any]:
    try:
        outcome: tuple[bool, Any] = pickle.loads(reader.recv_bytes())
        return outcome
    except EOFError:
        return False, "a process died"


def _main(writer: Connection, store: str, rank: int, size: int, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
        writer.send_bytes(pickle.dumps((True, work(rank, *args))))  # tensors by value: the process is about to end
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        writer.send_bytes(pickle.dumps((False, f"process {rank}: {traceback.format_exc()}")))
