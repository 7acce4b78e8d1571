"""What a training step keeps for backward, found by running the forward pass on fake tensors.

Autograd saves what it would save of real ones, so any architecture is covered without a formula of its own. Only the
rank-sized H is taken out and added again by formula, because it depends on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from transformers import masking_utils

from ardlora_ext.config import AdapterConfig
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.inject import inject, unwrap
from ardlora_ext.model.record import adapters
from ardlora_ext.plan.experts import planned_experts
from ardlora_ext.plan.skeleton import fake_mode

_H_BYTES = 4  # H is float32


@dataclass(frozen=True)
class Trace:
    """What one forward pass keeps, in bytes, without the model's own tensors.

    Attributes:
        rows: of activations that each adapted module sees [M].
        ours: bytes saved with our adapters, without H.
        peft: bytes saved with PEFT's, without x A^T.
        layers: of `ours`, by transformer layer.
        boundaries: bytes of the layers' outputs, what checkpointing keeps instead of `layers`.
        problem: why nothing could be traced, or "".
    """

    rows: Mapping[str, int]
    ours: int
    peft: int
    layers: tuple[int, ...]
    boundaries: int
    problem: str = ""

    @property
    def checkpointed(self) -> int:
        """Bytes with every layer checkpointed: outside of layers, boundaries, and one layer that is recomputed."""
        return self.ours - sum(self.layers) + self.boundaries + max(self.layers, default=0)


class SavedBytes:
    """Counts the storages that autograd holds for backward, each once; parameters and buffers do not count."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._held: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []  # alive, so that an address is not used twice

    def _pack(self, t: torch.Tensor) -> torch.Tensor:
        key = _storage(t)
        if key not in self._own:
            self._held[key] = t.untyped_storage().nbytes()
            self._kept.append(t)
        return t

    @property
    def total(self) -> int:
        """Bytes held so far."""
        return sum(self._held.values())

    @contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        """Count what the code inside saves."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield self


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


class _PeftLinear(nn.Module):
    """What PEFT 0.21 computes in a LoRA layer with float32 factors, operation by operation."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(in_features, 1, bias=False)
        self.lora_B = nn.Linear(1, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return base(x) + scaling * B(A(x)), as PEFT casts it."""
        result: torch.Tensor = self.base_layer(x)
        update: torch.Tensor = self.lora_B(self.lora_A(x.to(torch.float32)))
        return (result + update * 0.5).to(result.dtype)


def trace(model: nn.Module, config: AdapterConfig, batch: int, length: int) -> Trace:
    """Return what a step of `batch` sequences of `length` tokens (or as many images) keeps for backward.

    Args:
        model: a skeleton; unchanged afterwards.
        config: of the adapters.
        batch: sequences.
        length: tokens of each; images have their own.
    """
    model.train()
    with fake_mode(model), _one_text_a_row():
        inject(model, config)
        try:
            return _trace(model, batch, length)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            return Trace({}, 0, 0, (), 0, f"{type(model).__name__} looks at values in its forward pass ({error})")
        finally:
            unwrap(model)


def _trace(model: nn.Module, batch: int, length: int) -> Trace:
    layers = adapters(model)
    for layer in layers.values():
        layer.lora_dropout = 0.0  # keeps nothing: masks are computed again
    stacks = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertStack)}
    linears = {name: layer for name, layer in layers.items() if name not in stacks}
    rows: dict[str, int] = {}
    handles = [layer.register_forward_pre_hook(_row_counter(rows, name)) for name, layer in linears.items()]
    try:
        with planned_experts(model, stacks) as of_stacks:
            total, blocks = _count(model, _blocks(model, layers), batch, length)
    finally:
        for handle in handles:
            handle.remove()
    h = {n: _H_BYTES * rows.get(n, 0) * min(len(layer.lora_A), len(layer.lora_B)) for n, layer in linears.items()}
    with _peft_layers(model, linears), planned_experts(model, stacks, dense=True):
        peft, _ = _count(model, {}, batch, length)
    inner = tuple(b.saved - sum(v for n, v in h.items() if n.startswith(name + ".")) for name, b in blocks.items())
    boundaries = sum(block.output for block in blocks.values())
    peft -= sum(_H_BYTES * m for m in rows.values())
    return Trace(rows | of_stacks, total - sum(h.values()), peft, inner, boundaries)


def _one_text_a_row() -> AbstractContextManager[Any]:
    """Tell transformers that no row packs several texts, which it would look for in values: then there is no mask."""
    name = "find_packed_sequence_indices"
    return mock.patch.object(masking_utils, name, return_value=None) if hasattr(masking_utils, name) else nullcontext()


def _row_counter(rows: dict[str, int], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Note how many rows of x a module sees; one that is used several times sees them all."""

    def count(_module: nn.Module, args: tuple[Any, ...]) -> None:
        rows[name] = rows.get(name, 0) + args[0].numel() // args[0].shape[-1]

    return count


def _blocks(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the transformer layers that hold adapted modules: the members of the outermost lists of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found: dict[str, nn.Module] = {}
    for name in names:
        outer = min((n for n in lists if name.startswith(n + ".")), key=len, default=None)
        if outer is not None:
            block = f"{outer}.{name.removeprefix(outer + '.').split('.')[0]}"
            found[block] = model.get_submodule(block)
    return found


@contextmanager
def _peft_layers(model: nn.Module, linears: Mapping[str, LoraLinear]) -> Iterator[None]:
    """Put PEFT's layers where ours stand."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in linears]
    for (parent, leaf), ours in zip(places, linears.values(), strict=True):
        setattr(parent, leaf, _PeftLinear(ours.base_layer, ours.layout.in_features, ours.layout.out_features))
    try:
        yield
    finally:
        for (parent, leaf), ours in zip(places, linears.values(), strict=True):
            setattr(parent, leaf, ours)


@dataclass
class _Block:
    """A transformer layer while it is traced: bytes it saved, bytes of what it returned."""

    before: int = 0
    saved: int = 0
    output: int = 0


def _count(model: nn.Module, layers: Mapping[str, nn.Module], batch: int, length: int) -> tuple[int, dict[str, _Block]]:
    """Run forward and loss; return the bytes saved, and those of each of `layers`."""
    counter = SavedBytes(model)
    blocks = {name: _Block() for name in layers}

    def enter(block: _Block) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            block.before = counter.total

        return hook

    def leave(block: _Block) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            block.saved = counter.total - block.before
            first = output[0] if isinstance(output, tuple) else output
            block.output = first.numel() * first.element_size()

        return hook

    handles = [layers[name].register_forward_pre_hook(enter(block)) for name, block in blocks.items()]
    handles += [layers[name].register_forward_hook(leave(block)) for name, block in blocks.items()]
    try:
        with counter.counting():
            loss = _loss(model, batch, length)
    finally:
        for handle in handles:
            handle.remove()
    del loss
    return counter.total, blocks


def _loss(model: Any, batch: int, length: int) -> torch.Tensor:
    """Return the loss of a made-up batch; without padding, so without an attention mask."""
    name = type(model).__name__
    ids = torch.zeros(batch, length, dtype=torch.long)
    if hasattr(model, "get_image_features"):
        return _image_text_loss(model, ids)
    if "ImageClassification" in name:
        size, channels = model.config.image_size, model.config.num_channels
        pixels = torch.zeros(batch, channels, size, size, dtype=model.dtype)
        found = model(pixel_values=pixels, labels=torch.zeros(batch, dtype=torch.long)).loss
    elif "SequenceClassification" in name:
        model.config.pad_token_id = None if batch == 1 else 1  # decoders look for the last token that is not padding
        found = model(input_ids=ids, labels=torch.zeros(batch, dtype=torch.long)).loss
    elif "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name:
        found = model(input_ids=ids, labels=ids, use_cache=False).loss
    else:
        found = model(input_ids=ids).last_hidden_state
    return found  # type: ignore[no-any-return]


def _image_text_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """As the forward of LLaVA-like models, with the image's tokens before the text instead of at places in it."""
    vision = model.config.vision_config
    pixels = torch.zeros(len(ids), vision.num_channels, vision.image_size, vision.image_size, dtype=model.dtype)
    features = model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    embeds = torch.cat([features.view(len(ids), -1, features.shape[-1]), model.get_input_embeddings()(ids)], dim=1)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    labels = torch.zeros(embeds.shape[:2], dtype=torch.long)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
