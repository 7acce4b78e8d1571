"""Something to compute with, for a model of which only its signature and config are known."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ardlora_ext.bench.zoo.tiny import VOCABULARY

Inputs = dict[str, torch.Tensor]
_TOKENS = 12
_MOST_TOKENS = 400


def find_inputs(model: PreTrainedModel) -> Inputs:
    """Return inputs that the model takes, with all its modalities where they are understood.

    Raises:
        ValueError: none of those that were tried; the message has what the first attempts raised.
    """
    problems: list[str] = []
    for inputs in _candidates(model):
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                found = outputs(model(**inputs))
                model.train()(**inputs)  # some ask for labels then
        except Exception as cause:
            problems.append(f"{'+'.join(inputs)}: {type(cause).__name__}: {' '.join(str(cause).split())[:160]}")
            continue
        finally:
            model.eval()
        if found and all(bool(torch.isfinite(value).all()) for value in found):
            return inputs
        problems.append(f"{'+'.join(inputs)}: no finite output")
    raise ValueError("; ".join(problems[:4]) or "nothing is known to call it with")


def outputs(found: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors of a model's output, whatever holds them."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() and found.numel() else []
    if isinstance(found, dict):
        return [value for item in found.values() for value in outputs(item)]
    if isinstance(found, (list, tuple)):
        return [value for item in found for value in outputs(item)]
    return []


def _candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    text = _text(model, set(names), generator)
    seen = [*_images(model, set(names), generator), *_sounds(model, set(names), generator)]
    for other in seen:
        if "input_ids" in names:
            for tokens in _with_image_tokens(model, other, text):
                yield other | tokens
        else:
            yield other | text
    if text:
        yield text
    yield from seen
    try:
        dummy = model.dummy_inputs
    except Exception:  # a stranger's property
        dummy = {}
    yield {key: value for key, value in dummy.items() if isinstance(value, torch.Tensor)}


def _text(model: PreTrainedModel, names: set[str], generator: torch.Generator) -> Inputs:
    found: Inputs = {}
    special = _special(model.config)
    allowed = torch.tensor([i for i in range(3, VOCABULARY // 2) if i not in special])
    for name, length in (("input_ids", _TOKENS), ("decoder_input_ids", 6)):
        if name in names:
            found[name] = allowed[torch.randint(len(allowed), (2, length), generator=generator)]
    if "bbox" in names:
        found["bbox"] = torch.zeros(2, _TOKENS, 4, dtype=torch.int64)
    return found


def _special(config: PreTrainedConfig) -> set[int]:
    """Return the numbers that a config gives a meaning, in its parts too."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= _special(value)
        elif name.endswith(("_id", "_index", "_idx")) and isinstance(value, int):
            found.add(value)
    return found


def _with_image_tokens(model: PreTrainedModel, other: Inputs, text: Inputs) -> Iterator[Inputs]:
    """Yield text in which as many image tokens stand as the model makes of an image, which it says; then text alone."""
    token = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
    counts = {1}
    if isinstance(token, int) and "pixel_values" in other:
        try:
            with torch.no_grad():
                model(**other, **_placed(text, token, 1))
        except Exception as cause:  # transformers: "tokens: 2, features: 128"
            said = re.search(r"features:?\D{0,12}(\d+)", str(cause))
            width = _number(model.config, "hidden_size") or 1
            counts = {1} if said is None else {int(said[1]) // 2, int(said[1]) // width // 2}
    if not isinstance(token, int) or "pixel_values" not in other:
        counts = set()
    for count in sorted(counts - {0}):
        if count < _MOST_TOKENS:
            placed: Inputs = _placed(text, token, count)
            if "image_grid_thw" in other:
                placed["mm_token_type_ids"] = placed["input_ids"].eq(token or 0).to(torch.int64)
            yield placed
    yield text


def _placed(text: Inputs, token: Any, count: int) -> Inputs:
    ids = text["input_ids"]
    return text | {"input_ids": torch.cat([ids[:, :2], torch.full((2, count), token), ids[:, 2:]], 1)}


def _images(model: PreTrainedModel, names: set[str], generator: torch.Generator) -> list[Inputs]:
    name = next((n for n in ("pixel_values", "pixel_values_videos") if n in names), None)
    if name is None:
        return []
    channels = _number(model.config, "num_channels", "in_channels", "in_chans") or 3
    side = _number(model.config, "image_size", "img_size", "input_size", "crop_size") or 32
    frames = _number(model.config, "num_frames", "frames_per_clip") or 2
    sides = dict.fromkeys((side, 64, 224))
    shapes = [(2, channels, s, s) for s in sides] + [
        (2, frames, channels, side, side),
        (2, channels, frames, side, side),
    ]
    found: list[Inputs] = [{name: torch.rand(shape, generator=generator)} for shape in shapes]
    extra: list[Inputs] = []
    if "image_grid_thw" in names:  # patches of both images in one row
        patch, temporal = _number(model.config, "patch_size") or 14, _number(model.config, "temporal_patch_size") or 1
        pixels = torch.rand(2 * 16, channels * temporal * patch * patch, generator=generator)
        extra.append({name: pixels, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])})
    return extra + found


def _sounds(model: PreTrainedModel, names: set[str], generator: torch.Generator) -> list[Inputs]:
    found: list[Inputs] = []
    if "input_features" in names:
        mels = _number(model.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels") or 80
        time = 2 * (_number(model.config, "max_source_positions") or 64)
        for length in dict.fromkeys((min(time, 3000), 128)):
            found += [
                {"input_features": torch.rand(shape, generator=generator)}
                for shape in ((2, mels, length), (2, length, mels))
            ]
    if "input_values" in names:
        bins, length = _number(model.config, "num_mel_bins") or 80, _number(model.config, "max_length") or 128
        for shape in ((2, 4000), (2, 1, 4000), (2, length, bins), (2, 1, length, bins)):
            found.append({"input_values": torch.rand(shape, generator=generator) - 0.5})
    if "past_values" in names:
        length = _number(model.config, "context_length") or 32
        found.append({"past_values": torch.rand(2, length, _number(model.config, "num_input_channels") or 1)})
    return found


def _number(config: PreTrainedConfig, *names: str) -> int | None:
    """Return the first of these fields that is a number, of the config or of a part of it."""
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    for owner in (config, *parts):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
