"""The model card of an adapter: README.md as the Hub reads it, with the metadata that PEFT writes.

A card says whether it was written here. Only such a card is written anew; a README of the user's stays byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

CARD = "README.md"
_MARK = "<!-- Written anew on every save. Take this line out, and the page is yours. -->"
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


def model_card(
    method: str, base_model: str | None, task_type: str | None, ranks: Mapping[str, Sequence[int]], parameters: int
) -> str:
    """Return the card of an adapter.

    Args:
        method: its name for people, such as "ARD-LoRA".
        base_model: name on the Hub, or folder; None where the model has none.
        task_type: PEFT's.
        ranks: of each unit, by module.
        parameters: of the adapter, live.
    """
    units = [rank for of_module in ranks.values() for rank in of_module]
    base = base_model if base_model and not Path(base_model).is_absolute() else None  # the Hub takes no folders
    head = [f"base_model: {base}"] if base else []
    head += ["library_name: peft"]
    if task_type in _PIPELINES:
        head.append(f"pipeline_tag: {_PIPELINES[task_type]}")
    tags = ["lora", "ardlora_ext", re.sub(r"[^a-z0-9]+", "-", method.lower())]
    tags += [f"base_model:adapter:{base}"] if base else []
    head += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(tags))]
    of_units = f"{len(units)} units of {len(ranks)} matrices" if len(units) > len(ranks) else f"{len(ranks)} matrices"
    body = [
        f"# {method} adapter",
        "",
        f"- Base model: {base_model or 'not named'}",
        f"- Method: {method}",
        f"- Ranks: {min(units)} to {max(units)}, mean {fmean(units):.2f}, of {of_units}" if units else "- Ranks: none",
        f"- Parameters: {parameters:,}",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base, "this folder or repository")',
        "```",
        "",
        "or `ardlora_ext.load_pretrained(base, folder)` to train on with ranks that move.",
    ]
    return "\n".join(["---", *head, "---", "", _MARK, "", *body, ""])


def with_facts(card: str, facts: Mapping[str, str]) -> str:
    """Return a card that tells more, such as the data and the score of a run."""
    lines = "".join(f"- {name}: {' '.join(text.split())}\n" for name, text in facts.items())
    return re.sub(r"(?m)^- Parameters: .*\n", lambda found: found[0] + lines, card, count=1)


def may_write_card(folder: Path) -> bool:
    """Tell whether the folder has no README, or one that was written here; one that cannot be read is the user's."""
    path = folder / CARD
    try:
        return not path.exists() or _MARK in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def with_metadata_of(card: str, text: str) -> str:
    """Return `text`, another's page, with the metadata of `card`: its keys replace those of the same name."""
    ours, theirs = _head(card)[0], _head(text)[0]
    kept = {key: lines for key, lines in theirs.items() if key not in ours or key == "tags"}
    tags = [line for line in theirs.get("tags", [])[1:] if line not in ours["tags"]]
    head = [line for lines in ({**ours, **{k: v for k, v in kept.items() if k != "tags"}}).values() for line in lines]
    place = head.index("tags:") + len(ours["tags"])
    return "\n".join(["---", *head[:place], *tags, *head[place:], "---", _head(text)[1]])


def _head(text: str) -> tuple[dict[str, list[str]], str]:
    """Split a page into the lines of its metadata, by key, and the rest."""
    found = re.match(r"---\n(.*?)\n---\n?(.*)", text, re.S)
    entries: dict[str, list[str]] = {}
    for line in found[1].splitlines() if found else []:
        if re.match(r"[A-Za-z_][\w-]*:", line):
            entries[line.partition(":")[0]] = [line]
        elif entries:
            entries[next(reversed(entries))].append(line)
    return entries, found[2] if found else text
