"""Transformers models and tokenizers from a local folder, with the head that a corpus needs; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ardlora_ext.errors import InputError, first_line
from ardlora_ext.train.data import Corpus


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer beside a model; one without a padding token pads with its end-of-sequence token."""
    _check_model_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_source(folder))
    except Exception as error:  # transformers has an error class for each way in which a file can be broken
        raise InputError(f"load_tokenizer: {folder} must hold a tokenizer: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"load_tokenizer: the tokenizer in {folder} must have a padding or an end-of-sequence token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, corpus: Corpus, tokenizer: Any) -> torch.nn.Module:
    """Load the transformers model in `folder` with the head that `corpus` needs, in float32.

    A classification head of another size than the corpus has classes is replaced by a fresh one.
    """
    _check_model_folder(folder)
    try:
        source = _source(folder)
        config = AutoConfig.from_pretrained(folder, **source)
        if corpus.task == "lm":
            _check_causal(folder, config)
            model = AutoModelForCausalLM.from_pretrained(folder, **source)
        else:
            names = dict(enumerate(corpus.labels))
            model = AutoModelForSequenceClassification.from_pretrained(
                folder,
                ignore_mismatched_sizes=True,
                id2label=names,
                label2id={name: index for index, name in names.items()},
                **source,
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"load_model: {folder} cannot be loaded for {corpus.task}: {first_line(error)}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    return _plain(model) if "gguf_file" in source else model.float()


def head_modules(model: Any) -> tuple[str, ...]:
    """Name the modules that must be trained in full: the new classification head, and the encoder's pooler below it.

    The pooler of a pretrained encoder was seldom trained for anything like the new task; left frozen, it is a
    bottleneck that no adapter can widen (with all-MiniLM-L6-v2, LoRA then falls far behind full fine-tuning).
    """
    base = model.base_model_prefix
    heads = [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]
    pooler = getattr(getattr(model, base, None), "pooler", None)
    return ("pooler", *heads) if isinstance(pooler, torch.nn.Module) else tuple(heads)


def held_length(model: torch.nn.Module, length: int) -> int:
    """Return `length`, or the longest sequence that the model has positions for.

    A learned table with a padding index (RoBERTa) has its positions behind it.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return length
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == limit]
    offset = max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
    return min(length, limit - offset)


def _check_model_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"load_model: --model must be an existing folder, got {folder}")
    if not (folder / "config.json").is_file() and not _source(folder).get("gguf_file"):
        raise InputError(f"load_model: --model must hold a config.json or one .gguf file, got {folder}")


def _source(folder: Path) -> dict[str, Any]:
    """Return the arguments that keep transformers local, and name the GGUF file of a folder that has nothing else."""
    ggufs = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    return {"local_files_only": True, **({"gguf_file": ggufs[0].name} if len(ggufs) == 1 else {})}


def _check_causal(folder: Path, config: Any) -> None:
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"load_model: text without labels needs a causal language model, got {config.model_type} in {folder}"
        )


def _plain(model: Any) -> torch.nn.Module:
    """Rebuild a model read from GGUF: transformers marks it as quantised, though its layers are ordinary float32."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain  # type: ignore[no-any-return]
