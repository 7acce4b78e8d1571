"""README.md of an adapter: what PEFT's card says, and no word into a page of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from torch import nn

import ardlora_ext as ard
from ardlora_ext.checkpoint.reexport import reexport
from ardlora_ext.report.model_card import model_card, with_metadata_of

from helpers.models import llama


def wrapped(name: str = "someone/base") -> Any:
    model = llama()[0]
    model.config._name_or_path = name  # type: ignore[union-attr]
    return ard.wrap(model, ard.ArdConfig(mode="paper", granularity="head", r0=3))


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_every_save_writes_one_that_the_hub_reads(tmp_path: Path) -> None:
    model = wrapped()
    for save in (lambda: ard.save_pretrained(model, tmp_path), lambda: model.save_pretrained(tmp_path)):
        save()
        data = ModelCard.load(tmp_path / "README.md").data
        assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "someone/base", "text-generation")
        assert data.tags == ["lora", "ardlora_ext", "ard-lora", "base_model:adapter:someone/base"]
        text = (tmp_path / "README.md").read_text()
        assert "- Method: ARD-LoRA\n- Ranks: 3 to 3, mean 3.00" in text
        (tmp_path / "README.md").unlink()


@pytest.mark.filterwarnings("ignore:save_pretrained")
@pytest.mark.parametrize("config", [ard.ArdConfig(r0=3), ard.ElaConfig(r=3), ard.DoraConfig(r=3)])
def test_an_export_has_the_card_of_the_save(config: Any, tmp_path: Path) -> None:
    model = llama()[0]
    model.config._name_or_path = "someone/base"  # type: ignore[union-attr]
    ard.save_pretrained(ard.wrap(model, config), tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_bytes()
    reexport(tmp_path / "run", tmp_path / "served")
    assert (tmp_path / "served" / "README.md").read_bytes() == card
    (tmp_path / "served" / "README.md").write_text("# Mine\n")
    reexport(tmp_path / "run", tmp_path / "served", form="compact")
    assert (tmp_path / "served" / "README.md").read_text() == "# Mine\n"


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_page_of_the_users_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    ard.save_pretrained(wrapped(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert (tmp_path / "adapter_config.json").is_file()


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_page_that_cannot_be_read_stops_no_save(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    ard.save_pretrained(wrapped(), tmp_path)
    assert (tmp_path / "README.md").is_dir()
    assert (tmp_path / "adapter_config.json").is_file()


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_card_that_trainer_has_written_gets_the_metadata(tmp_path: Path) -> None:
    theirs = "---\nlibrary_name: transformers\nlicense: mit\ntags:\n- generated_from_trainer\n---\n# run\n\ntext\n"
    (tmp_path / "README.md").write_text(theirs)
    wrapped().create_or_update_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("peft", "mit", "someone/base")
    assert card.data.tags[0] == "lora"
    assert card.data.tags[-1] == "generated_from_trainer"
    assert card.text.strip() == "# run\n\ntext"


@pytest.mark.filterwarnings("ignore:save_pretrained")
@pytest.mark.parametrize("theirs", [None, "# Mine\n"])
def test_push_to_hub_sends_the_adapter_and_its_card(theirs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    sent: dict[str, list[str]] = {}

    class Repository(str):
        repo_id = "me/adapter"

    def download(_api: HfApi, _repo: str, name: str, *, local_dir: str, **_options: Any) -> None:
        if theirs is None:
            raise LocalEntryNotFoundError("none")
        Path(local_dir, name).write_text(theirs)

    def upload(_api: HfApi, *, folder_path: str, **_options: Any) -> str:
        sent["files"] = sorted(path.name for path in Path(folder_path).iterdir())
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository("me/adapter"))
    monkeypatch.setattr(HfApi, "hf_hub_download", download)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert wrapped().push_to_hub("me/adapter") == "done"
    adapter = ["adapter_config.json", "adapter_model.safetensors", "ardlora_state.json", "ardlora_state.safetensors"]
    assert sent["files"] == [*([] if theirs else ["README.md"]), *adapter]


def test_cards_of_a_folder_and_of_nothing() -> None:
    text = model_card("LoRA", "/home/me/base", None, {"a": [2, 4], "b": [3]}, 1234)
    assert "base_model:" not in text, "the Hub takes no folders"
    assert "- Ranks: 2 to 4, mean 3.00, of 3 units of 2 matrices\n- Parameters: 1,234" in text
    assert with_metadata_of(text, "plain page").endswith("---\nplain page")
    assert "- Ranks: none" in model_card("LoRA", None, None, {}, 0)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    for model in (wrapped(), ard.wrap(nn.Sequential(nn.Linear(8, 8)), ard.LoraConfig(r=2))):
        model.print_trainable_parameters()
        assert capsys.readouterr().out == f"{ard.parameters_report(model)}\n"
        ard.unwrap(model)
        assert not hasattr(model, "print_trainable_parameters")
