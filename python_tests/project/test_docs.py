"""README.md and docs/*.md are executed, so that nothing in them goes stale.

One file is one story: its ```python blocks run in order, in one namespace, in an empty folder. A block inside an HTML
comment runs too and is not shown (a tiny model to set the stage). Shell blocks:

    ```bash                       every `python -m ardlora_ext...` line must be accepted by the command line's parser
    <!-- run --> before ```bash   every line is also run, after the Python blocks above it
    <!-- not run: REASON -->      before a Python block: it is only compiled
    <!-- file: NAME -->           before a Python block: it is a script, compiled and left in the folder
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ardlora_ext
from ardlora_ext import subcommands
from ardlora_ext.bench import cli as bench_cli
from ardlora_ext.commands import cli

from helpers.documents import ROOT, Block, blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command of a shell block; lines that end in a backslash go on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> None:
    """Have the command line's own parser judge a command; it exits where it refuses."""
    module, arguments = words[2], words[3:]
    if module == "ardlora_ext" and arguments[:1] == ["bench"]:
        module, arguments = "ardlora_ext.bench", arguments[1:]
    line = {"ardlora_ext": cli, "ardlora_ext.bench": bench_cli}.get(module)
    if line is not None:
        subcommands.parse(arguments, line.PROG, line.DESCRIPTION, line.COMMANDS)


def _has(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


@pytest.mark.parametrize("page", _has("python"), ids=lambda page: page.name)
def test_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            # Padded, so that a traceback shows the line of the page.
            code = compile("\n" * (block.line - 1) + block.text, page, "exec")
            if block.mark.startswith("file: "):
                Path(block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
            elif not block.mark:
                exec(code, scope)
        elif block.mark == "run":
            for words in commands(block):
                assert words[0] == "python", words
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run([sys.executable, *words[1:]], env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{page.name}: {shlex.join(words)}\n{done.stderr}"


@pytest.mark.parametrize("page", _has("bash"), ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            for words in commands(block):
                if words[:2] == ["python", "-m"]:
                    parse(words)


def test_every_fence_is_known() -> None:
    """A misspelt mark or language would silently not be tested."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w*)$", text, re.M)[::2]
        assert set(fences) <= {"python", "bash", "json", "yaml", "text", ""}, page.name
        assert len(blocks(page)) == sum(fence in ("python", "bash") for fence in fences), page.name


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_listed() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(r"`(\w+)(?:\([^`]*)?`", "".join(line for line in text.splitlines() if line.startswith("| `")))
    )
    assert set(ardlora_ext.__all__) - listed == {"__version__"}
    methods = re.findall(
        r"\w+(?=\()|records", next(line for line in text.splitlines() if line.startswith("| `Controller`"))
    )
    assert all(name == "records" or callable(getattr(ardlora_ext.Controller, name)) for name in methods)
