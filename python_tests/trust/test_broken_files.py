"""Broken files and full disks by name: one sentence, an exit code, and nothing changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from transformers import BertConfig

import ardlora_ext as ard
from ardlora_ext.bench.trust.beds import Block, build, fingerprint
from ardlora_ext.commands import cli
from ardlora_ext.errors import SavedElsewhere
from ardlora_ext.file_set import read_set, write_set
from ardlora_ext.report.run_files import run_files
from ardlora_ext.train import run_folder
from ardlora_ext.train.data import load_corpus

from helpers.run_files import metrics_of, record
from helpers.sealing import edit_json, old_checksums

CONFIG = ard.ArdConfig(mode="paper", r0=3, r_max=8, granularity="matrix")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer = build(CONFIG, steps=3)
    ard.save_pretrained(model, tmp_path / "saved")
    ard.save_state(model, optimizer, tmp_path / "saved")
    return tmp_path / "saved"


def refused(load: Callable[[Any], object], message: str, error: type[Exception] = ValueError) -> None:
    model = Block()
    before = fingerprint(model)
    with pytest.raises(error, match=message) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    assert fingerprint(model) == before


def edit_tensors(folder: Path, name: str, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / f"{name}.safetensors")
    edit(tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    if (folder / f"{name}.json").is_file():
        edit_json(folder / f"{name}.json", lambda _: None)


def test_checkpoints_from_before_the_json_was_covered_load(saved: Path) -> None:
    old_checksums(saved / "ardlora_state.json", as_text=False)
    old_checksums(saved / "ardlora_resume.json", as_text=True)
    ard.load_pretrained(Block(), saved)
    ard.load_state(*build(CONFIG), saved)


def test_a_number_changed_in_the_json_is_found(saved: Path) -> None:
    for name in ("ardlora_state.json", "ardlora_resume.json"):
        text = (saved / name).read_text()
        assert '"r0": 3' in text
        (saved / name).write_text(text.replace('"r0": 3', '"r0": 4'))
    refused(lambda model: ard.load_pretrained(model, saved), r"ardlora_state\.json must match its own checksum")
    model, optimizer = build(CONFIG)
    with pytest.raises(ValueError, match=r"ardlora_resume\.json must match its own checksum"):
        ard.load_state(model, optimizer, saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["q_proj.lora_A"].fill_(float("nan")), r"'q_proj\.lora_A' must be finite, got NaN or Inf"),
        (lambda t: t.update({"up.lora_B": t["up.lora_B"].long()}), r"'up\.lora_B' must be a floating-point tensor"),
        (lambda t: t.pop("q_proj.gate"), r"gate of 'q_proj' must be \[\d\], got none"),
        (lambda t: t.update({"q_proj.gate": torch.zeros(7, 2)}), r"gate of 'q_proj' must be \[\d\], got \[7, 2\]"),
    ],
    ids=["NaN", "integers", "no gate", "another gate"],
)
def test_unfit_tensors_are_refused_by_load_pretrained(
    saved: Path, edit: Callable[[Tensors], object], message: str
) -> None:
    edit_tensors(saved, "ardlora_state", edit)
    refused(lambda model: ard.load_pretrained(model, saved), message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s["controller"].update(alpha=[1.0]), "alpha"),
        (lambda s: s["controller"].pop("target"), "target"),
        (lambda s: s.pop("controller"), "controller"),
        (lambda s: s.pop("rng"), "rng"),
        (lambda s: s.update(rng=[]), "ZeroDivisionError"),
        (lambda s: s["rng"][0]["python"][1].pop(), "rng in ardlora_resume.json must be states of generators"),
        (lambda s: s["rng"][0].update(numpy=["MT19937"]), "IndexError"),
        (lambda s: s["optimizer"].pop("groups"), "groups"),
        (lambda s: s["optimizer"].update(numbers=7), "int"),
        (lambda s: s["others"]["scheduler"].pop("base_lrs"), "got no 'base_lrs'"),
        (lambda s: s.update(others=[]), "others"),
    ],
)
def test_load_state_changes_nothing_when_it_fails(tmp_path: Path, edit: Callable[[Any], object], message: str) -> None:
    model, optimizer = build(CONFIG, steps=4)
    scheduler = Stubborn()
    ard.save_state(model, optimizer, tmp_path, scheduler=scheduler)
    edit_json(tmp_path / "ardlora_resume.json", edit)
    model, optimizer = build(CONFIG, steps=2)
    before = fingerprint(model, optimizer)
    with pytest.raises(ValueError, match=message):
        ard.load_state(model, optimizer, tmp_path, scheduler=scheduler)
    assert fingerprint(model, optimizer) == before
    assert scheduler.value == 1
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()


class Stubborn:
    """A part of the loop that takes over half of a state and then finds the rest missing."""

    value = 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "base_lrs": [1.0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"] + 1 if "base_lrs" not in state else state["value"]
        _ = state["base_lrs"]


def test_an_interrupted_load_state_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(CONFIG, steps=2)
    before = fingerprint(model, optimizer)

    set_state, calls = torch.set_rng_state, []

    def interrupt(state: torch.Tensor) -> None:
        calls.append(state)
        if len(calls) == 1:
            raise KeyboardInterrupt
        set_state(state)

    monkeypatch.setattr(torch, "set_rng_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ard.load_state(model, optimizer, saved)
    assert fingerprint(model, optimizer) == before
    ard.load_state(model, optimizer, saved)
    assert model._ardlora.controller.step == 3


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_cut_tensors_are_named(tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(Block(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(lambda model: ard.load_peft(model, tmp_path, CONFIG), r"adapter_model\.safetensors must be a whole")
    assert cli.main(["check-adapter", str(tmp_path)]) == 2
    assert "adapter_model.safetensors must be a whole safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"rank_pattern": {"(": 4}}, "rank_pattern in adapter_config.json must hold regular expressions"),
        ({"rank_pattern": {"(([a-z_]+)+[.])+x": 4}}, "must have at most 6 repeats in an expression, none in another"),
        ({"alpha_pattern": [1]}, r"adapter_config\.json must be one of PEFT's LoRA"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern must map names to numbers, got '8'"),
        ({"r": True}, "rank and a scale"),
        ({"lora_alpha": float("inf")}, "rank and a scale"),
    ],
)
def test_hostile_adapter_configs(tmp_path: Path, patterns: dict[str, Any], message: str) -> None:
    get_peft_model(Block(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(patterns))
    refused(lambda model: ard.load_peft(model, tmp_path, CONFIG), message)


def test_a_read_only_folder_with_a_save_under_way_loads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer died between the commit and the last rename; whoever only reads can do nothing about it."""
    model, optimizer = build(CONFIG, steps=5)
    replace, left = os.replace, [2]

    def dying(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EROFS, "Read-only file system")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(OSError, match="the new files are whole, and are what a load finds"):
            ard.save_state(model, optimizer, saved)
    assert any(path.suffix == ".commit" for path in saved.iterdir())
    names = sorted(os.listdir(saved))
    other, other_optimizer = build(CONFIG)
    ard.load_state(other, other_optimizer, saved)
    assert other._ardlora.controller.step == 5
    assert sorted(os.listdir(saved)) == names


# The command line.


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.yaml", b"\xff\xfe\xff", "must be YAML or JSON in UTF-8"),
        ("a.json", b"[" * 20000, "must be YAML or JSON"),
        ("a.json", b'{"r": ' + b"9" * 5000 + b"}", "must be YAML or JSON"),
        ("a.yaml", b'json: "\\0"', "json must be of type Path"),
        ("a.json", b'{"json": "\\ud800"}', "json must be of type Path"),
    ],
)
def test_broken_option_files(
    tmp_path: Path, name: str, data: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert cli.main(["plan", "bert-base", "--config", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"hidden_act": 7}, {"vocab_size": -1}]
)
def test_broken_model_configs(tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    edit_json(tmp_path / "config.json", lambda config: config.update(changes))
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "\n".join(f"text {i},{i % 2}" for i in range(20)))
    assert cli.main(["plan", str(tmp_path)]) == 2
    words = ["finetune", "--model", str(tmp_path), "--data", str(rows), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if not line.startswith("error: ")] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "row 1: label must be an integer or a string, got 2.0"),
        ("[" * 20000, "line 2 must be JSON, got one that nests too deep"),
        ('{"text": "\\ud800", "label": 1}', "line 2 must be Unicode, got half a character"),
        ('{"text": "a", "label": "\\ud800"}', "line 2 must be Unicode, got half a character"),
    ],
)
def test_broken_rows(tmp_path: Path, line: str, message: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "b", "label": 2}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_corpus(rows)


def test_labels_of_any_length_are_ordered(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "\n".join(f"text {i},{'9' * (5000 if i % 2 else 1)}" for i in range(20)))
    assert len(load_corpus(rows).labels) == 2


@pytest.mark.parametrize(
    ("changes", "records", "message"),
    [
        ({"tokens_per_s": "x"}, [record(1)], r"metrics\.json must be complete"),
        ({"ranks": [1]}, [record(1)], r"metrics\.json must be complete"),
        ({}, [[1]], r"line 1 of .*records\.jsonl must be a JSON object"),
    ],
)
def test_hostile_run_files(tmp_path: Path, changes: Any, records: Any, message: str, capsys: Any) -> None:
    write_set(tmp_path, run_files({**metrics_of(), **changes}, records))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert re.search(f"error: report: .*{message}", capsys.readouterr().err)


# Full disks.


def test_a_run_is_saved_elsewhere_when_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build(CONFIG, steps=2)
    out, spare = tmp_path / "out", tmp_path / "spare"
    spare.mkdir()
    real = run_folder.write_set

    def full(directory: Path, files: Any) -> None:
        if directory == out:
            raise OSError(errno.ENOSPC, "No space left on device; no file was replaced", str(out))
        real(directory, files)

    monkeypatch.setattr(run_folder, "write_set", full)
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    with pytest.raises(SavedElsewhere, match=f"No space left on device.*'{out}'; the run is saved in {spare}"):
        run_folder.save_run(model, [record(1)], metrics_of(), out)
    (folder,) = spare.iterdir()
    assert ard.load_pretrained(Block(), folder)._ardlora.controller_state["step"] == 2
    assert {"metrics.json", "records.jsonl", "report.html", "adapter_model.safetensors"} <= set(os.listdir(folder))


def test_a_run_replaces_all_files_of_an_earlier_one_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(CONFIG, steps=1)
    monkeypatch.setattr(run_folder, "render", lambda metrics, _: f"a page of seed {metrics['seed']}")
    run_folder.save_run(model, [], metrics_of(seed=1), tmp_path)
    names = ("metrics.json", "report.html", "ardlora_state.json")
    model, optimizer = build(CONFIG, steps=2)
    assert isinstance(optimizer, AdamW)
    for limit in range(14):
        replace, left = os.replace, [limit]

        def dying(source: Any, target: Any, left: list[int] = left, replace: Any = replace) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with suppress(KeyboardInterrupt):
                run_folder.save_run(model, [], metrics_of(seed=2), tmp_path)
        files = read_set(tmp_path, names, "ardlora_state.json")
        found = json.loads(files["metrics.json"])["seed"], json.loads(files["ardlora_state.json"])["controller"]["step"]
        assert found in ((1, 1), (2, 2))
        assert files["report.html"] == f"a page of seed {found[0]}".encode()


def test_the_digest_of_tensors_is_what_it_was(saved: Path) -> None:
    """Versions before read this key, and nothing else of the checksums."""
    state = json.loads((saved / "ardlora_state.json").read_text())
    data = (saved / "ardlora_state.safetensors").read_bytes()
    assert state["sha256"]["ardlora_state.safetensors"] == hashlib.sha256(data).hexdigest()
