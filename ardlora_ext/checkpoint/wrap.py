"""`wrap`: adapters in a model, and a model that saves itself as PEFT's does: by the `save_pretrained` it has.

Whoever calls that, a script, Accelerate or Trainer, gets an adapter-sized checkpoint. Beside the adapter lies what
Trainer resumes from, `model.safetensors` with all that training changes; the frozen base is in neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import nn

from ardlora_ext.checkpoint.save_pretrained import save_pretrained
from ardlora_ext.checkpoint.training_state import moving_state
from ardlora_ext.config import AdapterConfig
from ardlora_ext.file_set import write_set
from ardlora_ext.model.inject import RESIZE, SAVE, activate, new_record, part_to_wrap, withdraw
from ardlora_ext.model.peft.convert import PeftLoraConfig
from ardlora_ext.model.record import ATTRIBUTE, Model, adapters
from ardlora_ext.unbroken import nothing, undone_by

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
    """
    part = part_to_wrap(model)
    record = new_record(part, config, adapter_name)
    activate(part, record, (lambda: save_adapters(part)) if hasattr(part, SAVE) else nothing)
    return model


def or_unwrapped(model: nn.Module) -> undone_by:
    """Take out what the `with` block puts into the model if it fails or is interrupted: the model is as it was."""
    before, own = getattr(model, ATTRIBUTE, None), {key: vars(model).get(key) for key in (SAVE, RESIZE)}
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
