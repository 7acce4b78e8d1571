"""What the compiler says about the CUDA kernels, without a GPU: registers, spills, shared memory, instructions."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ardlora_ext.bench.machine import Json, check_writable, source_tree, write_json
from ardlora_ext.errors import InputError

ARCHS = ("sm_80", "sm_90")
COLUMNS = ("kernel", "arch", "threads", "registers", "spills", "smem", "occupancy", "hmma", "ldgsts", "ldsm", "ldg128")


class Limits(NamedTuple):
    """What one SM holds (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    shared: int  # bytes
    threads: int
    blocks: int


_LIMITS = {
    80: Limits(164 * 1024, 2048, 32),
    86: Limits(100 * 1024, 1536, 16),
    89: Limits(100 * 1024, 1536, 24),
    90: Limits(228 * 1024, 2048, 32),
    100: Limits(228 * 1024, 2048, 32),
    120: Limits(100 * 1024, 1536, 24),
}
_REGISTERS = 65536  # of an SM, handed out to warps in pieces of 256
_RESERVED_SHARED = 1024  # of each block


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Return resident over possible warps of an SM.

    Args:
        arch: as nvcc's, "sm_80".
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block.

    Raises:
        ValueError: the architecture's limits are not known.
    """
    limits = _LIMITS.get(int(arch.removeprefix("sm_")))
    if limits is None:
        raise ValueError(f"occupancy: arch must be one of {', '.join(f'sm_{n}' for n in _LIMITS)}, got {arch}")
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        _REGISTERS // of_warp // warps,
        limits.shared // (-(-(shared + _RESERVED_SHARED) // 128) * 128),
        limits.threads // (warps * 32),
        limits.blocks,
    )
    return blocks * warps * 32 / limits.threads


def measure(archs: Sequence[str] = ARCHS) -> list[Json]:
    """Compile every kernel and return one row for each kernel and architecture.

    A row has kernel, arch, threads, registers, spills (bytes of spill stores, loads and stack), smem (bytes of a block,
    static and at most dynamic), occupancy, hmma, ldgsts, ldsm, ldg128 (instructions) and tensor_core. Instruction
    counts are None without nvdisasm.

    Raises:
        InputError: there is no nvcc, no source tree, or an architecture that nvcc or this module does not know.
    """
    nvcc, compiler = shutil.which("nvcc"), shutil.which(os.environ.get("CXX", "g++"))
    if nvcc is None or compiler is None:
        raise InputError("cuda-static: nvcc and a C++ compiler must be on the PATH")
    tree = source_tree()
    if tree is None:
        raise InputError(f"cuda-static: the source tree must be beside the package or the working folder, {Path.cwd()}")
    csrc = tree / "csrc"
    sources = sorted((csrc / "cuda").glob("*.cu"))
    for arch in archs:
        if arch not in {f"sm_{number}" for number in _LIMITS}:
            raise InputError(f"cuda-static: --arch must be one of {', '.join(f'sm_{n}' for n in _LIMITS)}, got {arch}")
    include = [f"-I{csrc}", f"-I{csrc / 'include'}"]
    with tempfile.TemporaryDirectory() as folder:
        shapes = _shapes(compiler, include, csrc, Path(folder))
        return [
            row
            for arch in archs
            for source in sources
            for row in _kernels(nvcc, include, source, arch, Path(folder) / f"{source.stem}_{arch}.cubin", shapes)
        ]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"cuda-static: {Path(command[0]).name} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout + done.stderr


def _shapes(compiler: str, include: Sequence[str], csrc: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Return threads and the largest dynamic shared memory by kernel, from the launchers' own constants."""
    program = folder / "shapes"
    sources = [str(csrc / "testing" / name) for name in ("shapes_main.cpp", "simt.cpp")]
    _run([compiler, "-std=c++20", *include, *sources, "-o", str(program)])
    lines = [line.split() for line in _run([str(program)]).splitlines()]
    return {kernel: (int(threads), int(shared)) for kernel, threads, shared in lines}


def _kernels(
    nvcc: str, include: Sequence[str], source: Path, arch: str, cubin: Path, shapes: Mapping[str, tuple[int, int]]
) -> Iterator[Json]:
    command = [nvcc, f"-arch={arch}", "-std=c++17", "-cubin", "-Xptxas", "-v", *include, str(source), "-o", str(cubin)]
    log = _run(command)
    instructions = _instructions(cubin)
    found = re.findall(
        r"Function properties for (\S+)\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        log,
    )
    for symbol, stack, stores, loads, registers, static in found:
        name = _readable(symbol)
        shape = shapes.get(name) or shapes.get(name.partition("<")[0])
        if shape is None:
            raise InputError(f"cuda-static: testing/shapes_main.cpp must list every kernel, {name} is missing")
        threads, dynamic = shape
        shared = int(static or 0) + dynamic
        counts = instructions.get(symbol, Counter()) if instructions is not None else None
        yield {
            "kernel": name,
            "arch": arch,
            "threads": threads,
            "registers": int(registers),
            "spills": int(stack) + int(stores) + int(loads),
            "smem": shared,
            "occupancy": occupancy(arch, threads, int(registers), shared),
            "hmma": counts and counts["HMMA"],
            "ldgsts": counts and counts["LDGSTS"],
            "ldsm": counts and counts["LDSM"],
            "ldg128": counts and counts["LDG.128"],
            "tensor_core": counts and counts["HMMA"] > 0,
        }


def _readable(symbol: str) -> str:
    """Return a kernel's name with its template arguments, without namespaces and parameters."""
    tool = shutil.which("c++filt")
    name = _run([tool, symbol]).strip() if tool else symbol
    name = re.sub(r"\b(?:ardlora|cuda|void)\b(?:::)?\s*", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return re.sub(r"\((?:bool|int)\)", "", name[:i])
    return name


def _instructions(cubin: Path) -> dict[str, Counter[str]] | None:
    """Count the instructions of each kernel, or return None where there is no nvdisasm."""
    tool = _disassembler()
    if tool is None:
        return None
    found: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in _run([tool, "-c", str(cubin)]).splitlines():
        if section := re.match(r"\s*\.text\.(\S+):", line):
            current = found.setdefault(section[1], Counter())
        # "@!PT": never executed, a workaround beside LDGSTS
        elif current is not None and (
            match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        ):
            name = match[2]
            if (match[1] or "").strip() != "@!PT":
                current[name.partition(".")[0]] += 1
                current["LDG.128"] += name.startswith("LDG.") and ".128" in name
    return found


def _disassembler() -> str | None:
    """Return nvdisasm of the PATH or of pip's nvidia-cuda-nvdisasm."""
    beside = (tool for folder in sys.path for tool in Path(folder).glob("nvidia/*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next((str(tool) for tool in beside if os.access(tool, os.X_OK)), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cuda-static`."""
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), metavar="SM", help="architectures to compile for")
    parser.add_argument("--json", type=Path, metavar="PATH", help="store the rows")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Print one line for each kernel and architecture."""
    check_writable(arguments.json, "--json")
    rows = measure(arguments.arch)
    text = [{key: "-" if row[key] is None else str(row[key]) for key in COLUMNS} for row in rows]
    for row, cells in zip(rows, text, strict=True):
        cells["occupancy"] = f"{row['occupancy']:.0%}"
    widths = {key: max(len(key), *(len(cells[key]) for cells in text)) for key in COLUMNS}
    print("  ".join(key.ljust(widths[key]) for key in COLUMNS))
    for cells in text:
        print("  ".join(cells[key].ljust(widths[key]) for key in COLUMNS))
    if _disassembler() is None:
        print("instruction counts need nvdisasm: pip install nvidia-cuda-nvdisasm")
    if arguments.json:
        write_json(arguments.json, command, rows)
