"""The rooms of the package: imports go one way, no room is a heap, no file is too long to read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.documents import ROOT

MOST_MODULES = 12  # in a folder
MOST_LINES = 400  # in a file
SOURCES = ("ardlora_ext", "csrc", "python_tests", "examples", "cmake")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("lint-imports", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip("lint-imports is not installed: pip install 'ardlora_ext[lint]'")
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    command = [tool, "--no-cache", "--config", str(root / "pyproject.toml")]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_imports_go_one_way() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        (
            "native/units.py",
            "from ardlora_ext.ranks import resize",
            "ardlora_ext.native.units -> ardlora_ext.ranks.resize",
        ),
        ("model/heads.py", "def hidden():\n    import ardlora_ext.train.callback", "ardlora_ext.model.heads"),
        ("config/checks.py", "from ardlora_ext import wrap", "ardlora_ext.config.checks -> ardlora_ext"),
        ("ranks/eight_bit.py", "from ardlora_ext.ranks import optimizer", "ardlora_ext.ranks"),
    ],
    ids=["upward", "inside a function", "the public names", "a circle in one room"],
)
def test_planted_imports_are_found(module: str, line: str, said: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ardlora_ext", tmp_path / "ardlora_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "ardlora_ext" / module).open("a") as file:
        file.write(f"\n\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout
    assert said in done.stdout


def test_the_package_does_not_import_the_compiler_of_torch() -> None:
    """It takes a second, and few need it."""
    code = "import sys, ardlora_ext; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_folder_is_a_heap() -> None:
    folders = {path.parent for path in (ROOT / "ardlora_ext").rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MOST_MODULES} == {}


def test_no_file_is_too_long() -> None:
    suffixes = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".cmake"}
    files = [path for source in SOURCES for path in (ROOT / source).rglob("*") if path.suffix in suffixes]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 200
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_tests_stand_where_their_subjects_do() -> None:
    """Every room of the package has a folder of tests of the same name, but for those that only hold other rooms."""
    rooms = {path.parent.name for path in (ROOT / "ardlora_ext").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "python_tests").glob("*/test_*.py")}
    assert rooms - folders == set()
    assert folders - rooms == {"project", "trust"}  # these are about the whole
