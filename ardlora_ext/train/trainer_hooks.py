"""Where transformers' Trainer, and what derives from it, tells a callback too little or too late.

Trainer tells callbacks everything but who trains, so it is looked up in the call that is running.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers.trainer
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ardlora_ext.checkpoint.training_state import moving_state
from ardlora_ext.file_set import write_set
from ardlora_ext.model.frozen import lend_adapter
from ardlora_ext.model.record import adapters, home, injection

_PARTS = "ardlora_parts.safetensors"
_CHECK = "validate_quantization_for_training"


def _callers() -> Iterator[dict[str, Any]]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back


def precede_reporters(callback: TrainerCallback) -> None:
    """Move `callback` before TensorBoard, W&B and the like, which must see what it adds to a log."""
    for names in _callers():
        handler = names.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return


def running_trainer() -> Trainer | None:
    """Return the Trainer whose event is being handled."""
    found = (names.get("self") for names in _callers())
    return next((trainer for trainer in found if isinstance(trainer, Trainer)), None)


def before_each_training(trainer: Trainer, act: Callable[[nn.Module], None]) -> None:
    """Call `act(model)` for each model that a Trainer with `model_init` makes, one for each training and each trial."""
    if trainer.model_init is None or "call_model_init" in vars(trainer):
        return
    own = trainer.call_model_init

    def made(trial: Any = None) -> nn.Module:
        model: nn.Module = own(trial)
        act(model)
        return model

    trainer.call_model_init = made


def check_fused_head(trainer: Trainer, model: nn.Module) -> None:
    """Refuse an adapter on the head where TRL computes the loss from `lm_head.weight` itself.

    Raises:
        ValueError: it would not be trained.
    """
    forward = vars(model).get("forward")
    if forward is None or "fused_lm_head" not in inspect.signature(forward, follow_wrapped=False).parameters:
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    name = next((name for name, layer in adapters(model).items() if layer is head), None)
    if name is not None:
        raise ValueError(
            f"RankCallback: target_modules must not take '{name}', because {type(trainer).__name__} multiplies by its "
            f"weight itself and an adapter would never be trained; leave it out (exclude_modules=['{name}']), or train "
            f"it whole by modules_to_save=['{name}']"
        )


def before_quantisation_check(act: Callable[[Any, nn.Module], None]) -> None:
    """Call `act(callback, model)` for each callback of a Trainer before it refuses a quantised model without adapters.

    Trainer judges the model before its callbacks hear of it. Once is enough; transformers without such a check of its
    own name (before 5) is left alone: there, wrap the model first.
    """
    check = getattr(transformers.trainer, _CHECK, None)
    if check is None or hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def acted(model: nn.Module) -> None:
        caller = inspect.currentframe()
        names = caller.f_back.f_locals if caller is not None and caller.f_back is not None else {}
        for callback in names.get("callbacks") or ():
            act(callback, model)
        check(model)

    setattr(transformers.trainer, _CHECK, acted)


# --- the reference of DPO, KTO, GRPO ----------------------------------------------------------------------------------


def users_reference() -> bool:
    """Tell, while a Trainer is made, whether its caller gave a reference model."""
    return any(names.get("ref_model") is not None for names in _callers())


def check_precomputed_reference(trainer: Trainer, model: nn.Module) -> None:
    """Refuse log-probabilities of a reference that TRL loads by itself, and that lacks what the adapter has learned.

    Raises:
        ValueError: they would be taken.
    """
    if getattr(trainer.args, "precompute_ref_log_probs", False) and _has_learned(model):
        raise ValueError(
            "RankCallback: precompute_ref_log_probs must come with ref_model=ardlora_ext.frozen_copy(model), because "
            "the adapter has learned already and the reference that TRL loads is the base without it"
        )


def complete_reference(trainer: Trainer, model: nn.Module) -> None:
    """Give the reference that TRL loaded, the bare base, a frozen copy of an adapter that has learned already."""
    reference = getattr(trainer, "ref_model", None)
    if not isinstance(reference, nn.Module) or adapters(reference) or not _has_learned(model):
        return
    lend_adapter(model, trainer.accelerator.unwrap_model(reference))
    warnings.warn(
        f"RankCallback: the reference that {type(trainer).__name__} loaded is the base alone; it now has a frozen copy "
        "of the adapter. ref_model=ardlora_ext.frozen_copy(model) does the same without a second base in memory",
        stacklevel=2,
    )


def _has_learned(model: nn.Module) -> bool:
    """Tell whether the model computes something else than its base."""
    saved = home(model).state_dict()
    kept = injection(model).values
    return any(bool(layer.lora_B.any()) for layer in adapters(model).values()) or any(
        not bool((saved[name] == value).all()) for name, value in kept.items()
    )


# --- a model of which only a part is wrapped --------------------------------------------------------------------------


def save_parts(model: nn.Module, folder: Path) -> None:
    """Write what training changes in all parts of a larger object, under its names."""
    write_set(folder, {_PARTS: save_tensors(moving_state(model), {"format": "pt"})})


def load_parts_on_resume(trainer: Trainer) -> None:
    """Let a Trainer with a loader of its own (sentence-transformers') resume a model of which a part is wrapped.

    Its loader builds the whole object anew from the checkpoint, with PEFT's names, which do not fit.
    """
    own = trainer._load_from_checkpoint
    if type(trainer)._load_from_checkpoint is Trainer._load_from_checkpoint:
        return

    def load(checkpoint_path: str, *args: Any, **kwargs: Any) -> Any:
        path = Path(checkpoint_path, _PARTS)
        model = trainer.model
        if not path.is_file() or not isinstance(model, nn.Module):
            return own(checkpoint_path, *args, **kwargs)
        return model.load_state_dict(load_file(path), strict=False)

    trainer._load_from_checkpoint = load
