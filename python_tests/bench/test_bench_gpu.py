"""`bench gpu`, rehearsed: every stage on the CPU with the kernels on the host, and what becomes of one that fails."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ardlora_ext.bench.cli import main
from ardlora_ext.bench.gpu import build, command, stage
from ardlora_ext.bench.gpu.context import HOST_RUN, Context, Skipped, load
from ardlora_ext.bench.gpu.shapes import Call
from ardlora_ext.bench.gpu.stage import STAGES, Stage
from ardlora_ext.native.compiled import core

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """A rehearsal with its host-run kernels built, on one thread."""
    found = Context(torch.device("cpu"), True, tmp_path_factory.mktemp("gpu"))
    try:
        rows = list(stage.run("build", found))
    except Skipped as why:
        pytest.skip(str(why))
    assert [row["ok"] for row in rows] == [True]
    assert (found.out / HOST_RUN).is_file()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [s.name for s in STAGES if s.name != "build"])
def test_every_stage_rehearses(name: str, context: Context) -> None:
    rows = list(stage.run(name, context))
    assert rows
    assert [row for row in rows if not row["ok"]] == []
    assert all(isinstance(row["case"], str) for row in rows)
    json.dumps(rows)


def test_a_wrong_kernel_is_found(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Call.run

    def wrong(self: Call) -> list[torch.Tensor]:
        found = own(self)
        found[3].view(-1)[-1] += 0.2 * found[3].abs().max()  # one entry of dB
        return found

    monkeypatch.setattr(Call, "run", wrong)
    assert [row["ok"] for row in stage.run("smoke", context)] == [False] * 3


def test_the_day_fits_into_nine_minutes() -> None:
    assert sum(s.seconds for s in STAGES) <= 540
    assert STAGES[0].seconds <= 60


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree to build, and all tools."""
    (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(build, "_ROOT", tmp_path)
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(build, "find_spec", lambda name: name)
    return tmp_path


def test_the_build_is_for_the_gpu_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_said", lambda *command: "9.0\n12.0" if command[0] == "nvidia-smi" else "/pybind11")
    configure = build.commands(tree / "build", build.architecture())[0]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in configure
    assert "-DARDLORA_CUDA=ON" in configure


def test_what_a_build_lacks_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name == "ninja" else name)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match=r"needs ninja and pybind11 \(pip install ninja pybind11\)"):
        build.commands(tree / "build", None)
    (tree / "CMakeLists.txt").unlink()
    with pytest.raises(build.BuildError, match="must run in the source tree"):
        build.commands(tree / "build", None)


def test_no_stage_spoils_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stages"
    folder.mkdir()
    (folder / "fake.py").write_text(
        "import sys, json, time\n"
        "name = sys.argv[1]\n"
        "print('row: ' + json.dumps({'case': 'a', 'ok': True}), flush=True)\n"
        "if name == 'bad': print('row: ' + json.dumps({'case': 'b', 'ok': False}))\n"
        "if name == 'broken': raise RuntimeError('no such thing')\n"
        "if name == 'slow': time.sleep(60)\n"
        "if name == 'absent': print('skipped: no tool')\n"
    )
    names = ("good", "bad", "broken", "slow", "absent")
    monkeypatch.setattr(command, "STAGES", tuple(Stage(name, "", 5, "help") for name in names))
    monkeypatch.setattr(command, "_MODULE", "fake")
    monkeypatch.setattr(command, "_DRY_SECONDS", 5)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    code = command.run(Namespace(out=tmp_path / "out", dry=True, stages=names), "bench gpu")
    saved = json.loads((tmp_path / "out" / command.RESULTS).read_text())
    verdicts = {row["stage"]: (row["verdict"], row["what"]) for row in saved["rows"]}
    assert code == 1
    assert verdicts["good"] == ("ok", "1 cases: help")
    assert verdicts["bad"] == ("failed", "1 of 2 cases, the first: b")
    assert verdicts["broken"] == ("failed", "RuntimeError: no such thing")
    assert verdicts["slow"] == ("failed", "longer than 5 s, after 1 cases")
    assert verdicts["absent"] == ("skipped", "no tool")
    assert "1 ok, 3 failed, 1 skipped" in capsys.readouterr().out
    assert {row["stage"]: len(row["rows"]) for row in saved["rows"]}["slow"] == 1  # what it had found is kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "a GPU must be there that torch sees; rehearse without one by --dry" in capsys.readouterr().err


def test_a_rehearsal_takes_the_kernels(context: Context) -> None:
    with context.kernels() as backend:
        assert backend.simt is load(context.out / HOST_RUN)
        assert backend.cuda_problem(0) == ""
    assert core.cuda_problem(0) != "" or core.cuda_built()
