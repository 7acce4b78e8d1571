"""Transformers models and tokenizers, from a local folder or the hub, with the head that a task needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_gguf_available

from ardlora_ext.errors import InputError, first_line
from ardlora_ext.train.settings import Task

# What is trained in full, or tied, stays as it is; transformers compares the ends of names.
_HEADS = ("classifier", "pre_classifier", "score", "pooler", "pooler.dense", "lm_head")


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer beside a model; one without a padding token pads with its end-of-sequence token."""
    source = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except Exception as error:  # transformers has an error class for each way in which a file can be broken
        raise InputError(f"load_tokenizer: {name} must hold a tokenizer: {first_line(error)}{_hint(name)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"load_tokenizer: the tokenizer in {name} must have a padding or an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str | Path,
    task: Task,
    labels: Sequence[str],
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
    attn: str | None = None,
) -> torch.nn.Module:
    """Load a transformers model with the head that `task` needs.

    A classification head of another size than there are classes is replaced by a fresh one.

    Args:
        name: Local folder, or id on the hub.
        task: What is learned.
        labels: Class names by index.
        tokenizer: The model's.
        dtype: Of the frozen weights.
        bits: 4 (NF4) or 8 to quantise them with bitsandbytes.
        attn: Implementation of attention, as in `from_pretrained`.

    Raises:
        InputError: it is not there, cannot be loaded, or has no such head.
    """
    source: dict[str, Any] = {**_source(name), "dtype": dtype}
    if attn is not None:
        source["attn_implementation"] = attn
    quantised: dict[str, Any] = {}
    if bits is not None:
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(_HEADS),
        )
    packed = "gguf_file" in source  # read as floats, and quantised after that
    if not packed:
        source |= quantised
    try:
        if task in ("lm", "sft"):
            _check_causal(name, AutoConfig.from_pretrained(name, **_source(name)))
            model = AutoModelForCausalLM.from_pretrained(name, **source)
        else:
            kind = (
                AutoModelForTokenClassification
                if task == "token-classification"
                else AutoModelForSequenceClassification
            )
            names = dict(enumerate(labels or ("value",)))
            model = kind.from_pretrained(
                name,
                ignore_mismatched_sizes=True,
                id2label=names,
                label2id={label: index for index, label in names.items()},
                **({"problem_type": "regression"} if task == "regression" else {}),
                **source,
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"load_model: {name} cannot be loaded for {task}: {first_line(error)}{_hint(name)}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    return _plain(model, quantised) if packed else model


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


def _source(name: str | Path) -> dict[str, Any]:
    """Return what names the GGUF file of a folder that has nothing else, and keeps transformers local in a folder."""
    folder = Path(name)
    if not folder.exists() and isinstance(name, str) and name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        return {}  # an id on the hub
    if not folder.is_dir():
        raise InputError(f"load_model: --model must be an existing folder or an id on the hub, got {name}")
    ggufs = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    if len(ggufs) != 1 and not (folder / "config.json").is_file():
        raise InputError(f"load_model: --model must hold a config.json or one .gguf file, got {folder}")
    if ggufs and not is_gguf_available():
        raise InputError(f"load_model: {ggufs[0].name} is read with gguf: pip install gguf")
    return {"local_files_only": True, **({"gguf_file": ggufs[0].name} if ggufs else {})}


def _hint(name: str | Path) -> str:
    """Say what to do where the hub cannot be reached."""
    hub = not Path(name).exists()
    return f"; without a network, run `hf download {name}` where there is one and give its folder" if hub else ""


def _check_causal(name: str | Path, config: Any) -> None:
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"load_model: text without labels needs a causal language model, got {config.model_type} in {name}"
        )


def _plain(model: Any, quantised: Mapping[str, Any]) -> torch.nn.Module:
    """Rebuild a model read from GGUF: transformers marks it as quantised, though its layers are ordinary floats."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = model.state_dict()
    return type(model).from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype, **quantised)  # type: ignore[no-any-return]


def answer(model: Any, tokenizer: Any, prompt: str | list[dict[str, str]], tokens: int = 24) -> str:
    """Return how a causal model goes on after a text, or answers the last of some messages, greedily."""
    words = {"return_tensors": "pt", "return_dict": True}
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **words)
    last = max(1, held_length(model, inputs["input_ids"].shape[1] + tokens) - tokens)  # of its positions
    inputs = {name: values[:, -last:].to(model.device) for name, values in inputs.items()}
    model.eval()
    found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text: str = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
