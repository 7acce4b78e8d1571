"""Tiny models of forty words, in folders, for the trainers of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

WORDS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(40)))
MOVING = {
    "mode": "paper",
    "granularity": "head",
    "r0": 2,
    "update_interval": 2,
    "lr_alpha": 0.2,
    "warmup_ratio": 0.1,
    "freeze_ratio": 0.2,
}


def save_llama(folder: Path) -> Path:
    """A LLaMA of one layer and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **special)).save_pretrained(folder)
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **names).save_pretrained(folder)
    return folder


def save_bert(folder: Path, labels: int | None = None) -> Path:
    """A BERT of one layer and its tokenizer, with a head for so many labels where one is wanted."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[4:]]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=45, **sizes, num_labels=labels or 2)
    model = BertModel(config) if labels is None else BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return folder


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"max_steps": 12, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "save_steps": 6}
    quiet = {"disable_tqdm": True, "logging_steps": 100, "learning_rate": 1e-2}
    return TrainingArguments(str(folder), **{**fixed, **quiet, **options})


def examples(count: int = 40) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(4, len(WORDS), (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]
