"""`wrap`: adapters in a model, and a model that saves itself as PEFT's does: by the `save_pretrained` it has.

Whoever calls that, a script, Accelerate or Trainer, gets an adapter-sized checkpoint. Beside the adapter lies what
Trainer resumes from, `model.safetensors` with all that training changes; the frozen base is in neither.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save as save_tensors
from torch import nn

from ardlora_ext.checkpoint.save_pretrained import adapter_files, save_pretrained
from ardlora_ext.checkpoint.training_state import moving_state
from ardlora_ext.config import AdapterConfig
from ardlora_ext.file_set import write_set
from ardlora_ext.model.inject import GIVEN, RESIZE, SAVE, activate, new_record, part_to_wrap, withdraw
from ardlora_ext.model.parameters import parameters_report
from ardlora_ext.model.peft.convert import PeftLoraConfig
from ardlora_ext.model.record import ATTRIBUTE, Model, adapters
from ardlora_ext.report.model_card import CARD, may_write_card, with_metadata_of
from ardlora_ext.unbroken import undone_by

WEIGHTS = "model.safetensors"  # transformers' SAFE_WEIGHTS_NAME


def wrap(model: Model, config: AdapterConfig | PeftLoraConfig, adapter_name: str = "default") -> Model:
    """Freeze the model and put an adapter on every target, in place.

    Args:
        model: any module with linear layers; a transformers model tells its heads itself. On the CPU or, where the
            build has CUDA kernels, on a CUDA device: adapters are put where their layer is.
        config: of any method, or a `peft.LoraConfig`, which becomes `LoraConfig` or `DoraConfig`.
        adapter_name: for models that get several, see `add_adapter`.

    Returns:
        The same model. Its `save_pretrained`, if it has one as transformers models do, writes the adapter from now on,
        as PEFT's does.

    Raises:
        ValueError: nothing matches (near misses are listed), the model is already wrapped, heads do not divide,
            `head_dim` matches no layer, a budget is out of range, an option of PEFT's config has no counterpart, the
            build has no kernels for the parameters' device.
            The model is unchanged then.
        TypeError: it is no model.
    """
    part = part_to_wrap(model)
    record = new_record(part, config, adapter_name)
    activate(part, record, lambda: _give(part))
    return model


def _give(part: Any) -> None:
    """Give a wrapped model the methods of a PEFT model."""
    if hasattr(part, SAVE):
        save_adapters(part)
    if not hasattr(part, "print_trainable_parameters"):
        part.print_trainable_parameters = ParametersPrinter(part)


def or_unwrapped(model: nn.Module) -> undone_by:
    """Take out what the `with` block puts into the model if it fails or is interrupted: the model is as it was."""
    before, own = getattr(model, ATTRIBUTE, None), {key: vars(model).get(key) for key in GIVEN}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def undo() -> None:
        if getattr(model, ATTRIBUTE, None) is not before:
            withdraw(model)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for key, value in own.items():
            vars(model).pop(key, None)
            if value is not None:
                vars(model)[key] = value

    return undone_by(undo)


def save_adapters(model: Any) -> None:
    """Let `model.save_pretrained` write the adapter from now on, and a load of what it writes be content."""
    setattr(model, SAVE, AdapterSaver(model))
    if hasattr(model, RESIZE):
        setattr(model, RESIZE, EmbeddingKeeper(model))
    if hasattr(model, "push_to_hub"):
        model.push_to_hub = HubPusher(model)
        model.create_or_update_model_card = CardWriter(model)
    if _forgive_missing_base not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(_forgive_missing_base)


class AdapterSaver:
    """`save_pretrained` of a wrapped model: an object, so that copies and pickles of the model keep it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the adapter where transformers would write the model; a model without one is written as ever.

        Options that say how to write a large model (`max_shard_size`, `state_dict`, ...) have no meaning for one.

        Raises:
            ValueError: `push_to_hub` is set.
        """
        model = self.model
        if not adapters(model):
            type(model).save_pretrained(model, save_directory, is_main_process, push_to_hub=push_to_hub, **kwargs)
            return
        if push_to_hub:
            raise ValueError("save_pretrained: push_to_hub must be False for an adapter; call model.push_to_hub(name)")
        if is_main_process:
            write_set(Path(save_directory), {WEIGHTS: save_tensors(moving_state(model), {"format": "pt"})})
            save_pretrained(model, Path(save_directory))


class HubPusher:
    """`push_to_hub` of a wrapped model: the adapter and its card; a card that is in the repository stays."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Upload what `save_pretrained` writes; a model without an adapter goes up as ever. Options as there."""
        if not adapters(self.model):
            about = {"commit_message": commit_message, "commit_description": commit_description, "private": private}
            options = {**about, "token": token, "revision": revision, "create_pr": create_pr, **kwargs}
            return type(self.model).push_to_hub(self.model, repo_id, **options)
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as there:
            save_pretrained(self.model, folder)
            with suppress(EntryNotFoundError):
                api.hf_hub_download(repository, CARD, revision=revision, local_dir=there)
            if not may_write_card(Path(there)):
                Path(folder, CARD).unlink()
            return api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


class CardWriter:
    """`create_or_update_model_card`, which Trainer calls after it has written a card over the adapter's."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the adapter's card, or the metadata of an adapter into the page that is there."""
        folder = Path(output_dir)
        card = adapter_files(self.model)[0][CARD].decode()
        text = card if may_write_card(folder) else with_metadata_of(card, (folder / CARD).read_text(encoding="utf-8"))
        write_set(folder, {CARD: text.encode()})


class ParametersPrinter:
    """`print_trainable_parameters` of a wrapped model, as of PEFT's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> None:
        """Print what trains, of how much."""
        print(parameters_report(self.model))


class EmbeddingKeeper:
    """`resize_token_embeddings` of a wrapped model: adapters and what `modules_to_save` keeps have the old size."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize a model without adapters as ever, ask for the size of any.

        Raises:
            ValueError: the size would change.
        """
        resize = type(self.model).resize_token_embeddings
        same = new_num_tokens is None or new_num_tokens == self.model.get_input_embeddings().weight.shape[0]
        if adapters(self.model) and not (same and not kwargs.get("pad_to_multiple_of")):
            raise ValueError(
                "resize_token_embeddings: model must not be wrapped, because adapters have the present size; resize "
                "first, then ardlora_ext.wrap(model, config) with the embeddings in modules_to_save"
            )
        return resize(self.model, new_num_tokens, *args, **kwargs)


def _forgive_missing_base(model: nn.Module, incompatible: Any) -> None:
    """Strike a base that is missing as a whole off the list of missing keys: it is frozen and in its place."""
    if not adapters(model):
        return
    moving = moving_state(model).keys()
    frozen = {name for name in model.state_dict() if name not in moving}
    if frozen <= set(incompatible.missing_keys):
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in frozen]
