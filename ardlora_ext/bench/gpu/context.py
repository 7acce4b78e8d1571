"""Where a stage computes: on a GPU, or, rehearsing, on the CPU with the CUDA kernels run on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

from ardlora_ext.bench.machine import source_tree
from ardlora_ext.native import dispatch, prepared
from ardlora_ext.native.compiled import core

HOST_RUN = "host_run.so"  # in the output folder
_ENGINE = "testing/simt.cpp"
_SOURCES = (  # the bindings, and every kernel with its launcher and tables
    "testing/simt_module.cpp",
    "bindings/cuda.cpp",
    "bindings/cuda_controller.cpp",
    "bindings/cuda_lora.cpp",
    "cuda/controller.cu",
    "cuda/device_facts.cpp",
    "cuda/gemm_plan.cpp",
    "cuda/launch.cu",
    "cuda/lora_linear.cu",
    "cuda/resize_table.cpp",
    "cuda/row_table.cpp",
    "cuda/segment_table.cpp",
    "core/lora_checks.cpp",
    "core/philox.cpp",
    "core/rank_resize.cpp",
    "core/regularizer.cpp",
    "core/unit_table.cpp",
)


class Skipped(Exception):  # noqa: N818 - no error
    """A stage does not apply here; the message says why."""


@dataclass(frozen=True)
class Context:
    """What a stage is told.

    Attributes:
        device: where tensors are; the CPU in a rehearsal.
        dry: whether this is a rehearsal: small sizes, no GPU.
        out: the output folder.
    """

    device: torch.device
    dry: bool
    out: Path

    def kernels(self) -> AbstractContextManager[Any]:
        """Let the CUDA kernels do what follows: in a rehearsal, on the host."""
        return host_run(load(self.out / HOST_RUN)) if self.dry else nullcontext()

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()


def build_host_run(file: Path) -> None:
    """Compile the CUDA bindings over kernels that run on the host (`csrc/testing/simt.h`) into a Python module.

    Raises:
        Skipped: there is no C++ compiler, no source tree, or no headers of Python.
    """
    compiler, python = shutil.which(os.environ.get("CXX", "g++")), sysconfig.get_paths()["include"]
    tree = source_tree()
    if compiler is None or tree is None or not (Path(python) / "Python.h").is_file():
        raise Skipped("running kernels on the host needs a C++ compiler, the source tree and the headers of Python")
    csrc = tree / "csrc"
    includes = [f"-I{csrc}", f"-I{csrc / 'include'}", *(f"-isystem{path}" for path in (*include_paths(), python))]
    command = [compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", *includes, "-x", "c++", "-c"]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(source: str) -> str:
            target = str(Path(folder, f"{Path(source).name}.o"))
            _compile([*command, "-O2" if source == _ENGINE else "-O0", str(csrc / source), "-o", target])
            return target

        _compile([compiler, "-shared", *pool.map(compiled, (_ENGINE, *_SOURCES)), "-o", str(file)])


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr[-2000:]}")


@contextmanager
def overlapping() -> Iterator[None]:
    """Let a kernel of a call begin before the one before it has ended, as ARDLORA_OVERLAP_LAUNCHES=1 does."""
    before = dispatch.overlap_launches(True)
    try:
        yield
    finally:
        dispatch.overlap_launches(before)


@lru_cache
def load(file: Path) -> Any:
    """Load what `build_host_run` made."""
    if not file.is_file():
        raise Skipped("the stage `build` has not made the kernels that run on the host")
    loader = ExtensionFileLoader("simt_core", str(file))
    spec = spec_from_loader("simt_core", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class HostRun:
    """The core with the CUDA calls of the host-run kernels; `calls` counts what is asked of it."""

    def __init__(self, simt: Any) -> None:
        self.simt, self.calls = simt, dict[str, int]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        return getattr(self.simt if hasattr(self.simt, name) else core, name)


@contextmanager
def host_run(simt: Any) -> Iterator[HostRun]:
    """Let every tensor pass for one on a CUDA device, whose kernels run on the host; device memory is the host's."""

    @lru_cache
    def table(words: bytes) -> Any:
        kind, factoring, in_features, out_features, *ranks = memoryview(words).cast("q")
        return simt.UnitTable(kind, factoring, in_features, out_features, ranks)

    backend = HostRun(simt)
    changed: list[tuple[Any, str, Any]] = [
        (dispatch, "core", backend),
        (dispatch, "_on_cuda", lambda _device: True),
        (dispatch, "_stream", lambda _device: (0, 0)),
        (prepared, "native_table", lambda encoded: table(encoded.numpy().tobytes())),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changed]
    try:
        for where, name, value in changed:
            setattr(where, name, value)
        yield backend
    finally:
        for where, name, value in before:
            setattr(where, name, value)
