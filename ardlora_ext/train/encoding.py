"""From rows to tokens, and what scores a model on them; the batches are made by transformers' collators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    default_data_collator,
)

from ardlora_ext.errors import InputError
from ardlora_ext.train.data import Corpus
from ardlora_ext.train.settings import Task

_logger = logging.getLogger(__name__)
_UNSCORED = -100  # labels that no loss counts, in torch and transformers


def encode(corpus: Corpus, tokenizer: Any, max_length: int, share: float) -> tuple[Dataset, Dataset]:
    """Return training and test part in tokens, with `labels`.

    Texts are cut at `max_length` tokens, with a word. For language modelling they are joined and cut into blocks of
    that length; without a test part the last `share` of the blocks is held out, so that neighbours do not leak into it.

    Raises:
        InputError: there is too little text, or a tokenizer that does not tell which word a token is of.
    """
    if corpus.task == "lm":
        return _blocks(corpus, tokenizer, max_length, share)
    if corpus.task == "token-classification" and not tokenizer.is_fast:
        raise InputError("finetune: token-classification must have a fast tokenizer, got one in Python")
    rows = _tagged if corpus.task == "token-classification" else _labelled
    keywords = {"tokenizer": tokenizer, "max_length": max_length}
    parts = []
    for part in (corpus.train, corpus.test):
        assert part is not None
        parts.append(part.map(rows, batched=True, fn_kwargs=keywords, remove_columns=part.column_names))
    say_what_is_cut(parts, max_length)
    return parts[0], parts[1]


def say_what_is_cut(parts: Sequence[Dataset], max_length: int) -> None:
    """Warn of texts in tokens that may have been longer."""
    full = sum(len(ids) >= max_length for part in parts for ids in part["input_ids"])
    if full:
        _logger.warning(
            "%d of %d texts fill --max-length %d tokens; longer ones are cut", full, sum(map(len, parts)), max_length
        )


def check_chats(corpus: Corpus, parts: Sequence[Dataset], max_length: int, packed: bool) -> None:
    """Say which of these chats, as TRL has made tokens of them, are cut, or gone because no answer is left.

    Raises:
        InputError: none is left to train on, or none to test on.
    """
    if packed:
        return
    for name, rows, part in (("training", corpus.train, parts[0]), ("test", corpus.test or (), parts[1])):
        if not len(part):
            raise InputError(
                f"finetune: --max-length must leave an answer to learn from, got {max_length} tokens and {len(rows)} "
                f"longer prompts in the {name} part"
            )
        if len(part) < len(rows):
            gone = len(rows) - len(part)
            _logger.warning(
                "%d of %d %s chats have no answer within --max-length %d tokens", gone, len(rows), name, max_length
            )
    say_what_is_cut(parts, max_length)


def _labelled(rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
    pairs = rows.get("text_pair")
    pairs = pairs if pairs and any(pairs) else None
    return {**tokenizer(rows["text"], pairs, truncation=True, max_length=max_length), "labels": rows["label"]}


def _tagged(rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Give each word's tag to its first token."""
    encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
    labels = []
    for index, tags in enumerate(rows["tags"]):
        words = encoded.word_ids(index)
        before = [None, *words[:-1]]
        labels.append([_UNSCORED if w is None or w == b else tags[w] for w, b in zip(words, before, strict=True)])
    return {**encoded, "labels": labels}


def _blocks(corpus: Corpus, tokenizer: Any, max_length: int, share: float) -> tuple[Dataset, Dataset]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokens(part: Dataset) -> list[int]:
        # verbose=False: a text is meant to be longer than the model's window, it is cut into blocks
        ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in part["text"])
        return list(chain.from_iterable([*text, *end] for text in ids))

    streams = [tokens(part) for part in (corpus.train, corpus.test) if part is not None]
    least = min(map(len, streams)) // (2 if len(streams) == 1 else 1)
    size = min(max_length, least)
    if size < 2:
        raise InputError(
            f"finetune: there must be enough text for blocks of tokens, got {min(map(len, streams))} tokens"
        )
    blocks = [
        Dataset.from_dict({"input_ids": cut, "labels": cut})
        for ids in streams
        for cut in [[ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]]
    ]
    if len(blocks) == 1:
        held_out = max(1, round(len(blocks[0]) * share))
        border = len(blocks[0]) - held_out
        blocks = [blocks[0].select(range(border)), blocks[0].select(range(border, len(blocks[0])))]
    return blocks[0], blocks[1]


def by_length(rows: Any) -> Any:
    """Return test rows in tokens, long ones first, so that a batch has little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lambda index: -lengths[index]))


def collator(task: Task, tokenizer: Any) -> Callable[[list[Any]], dict[str, Any]]:
    """Return what makes a batch of rows; blocks of text have one length."""
    if task == "lm":
        return default_data_collator  # type: ignore[no-any-return]
    kind = DataCollatorForTokenClassification if task == "token-classification" else DataCollatorWithPadding
    return kind(tokenizer)  # type: ignore[no-any-return]


def choose(logits: Any, labels: Any) -> torch.Tensor:
    """Keep of the logits what the metric needs: the chosen class, or the one number."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    chosen: torch.Tensor = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
    return chosen


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right classes, and of numbers Pearson's correlation with the right ones."""
    found, right = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if np.issubdtype(right.dtype, np.floating):
        spread = found.std() * right.std()
        centred = (found - found.mean()) * (right - right.mean())
        return {"correlation": float(centred.mean() / spread) if spread > 0 else 0.0}
    scored = right != _UNSCORED
    return {"accuracy": float((found == right)[scored].mean())}
