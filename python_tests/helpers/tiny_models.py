"""Model folders and data of a size for the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("good", "fine", "great", "bad", "poor", "awful", "the", "film", "plot", "was", "and", "very")


def save_tokenizer(folder: Path, **special: str) -> None:
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "</s>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A random BERT of two layers and four heads, with a tokenizer of fifteen words."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    folder = tmp_path / "tiny-bert"
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, pad_token="[PAD]")
    return folder


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A random LLaMA of two layers with grouped queries; its tokenizer has no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    folder = tmp_path / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, eos_token="</s>")
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Sentences whose adjective decides the label."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "reviews.jsonl"
    with path.open("w") as stream:
        for index in range(120):
            picks = torch.randint(0, 3, (3,), generator=generator).tolist()
            adjective = WORDS[picks[0] + 3 * (index % 2)]
            filler = " ".join(WORDS[6 + pick] for pick in torch.randint(0, 6, (5,), generator=generator).tolist())
            row = {"text": f"{filler} {adjective}", "label": ("good", "bad")[index % 2]}
            stream.write(json.dumps(row) + "\n")
    return path
