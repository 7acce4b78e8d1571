"""The models of `bench step` and `bench memory`, and how each implementation prepares one."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from ardlora_ext.checkpoint.wrap import wrap
from ardlora_ext.config import AdapterConfig, ArdConfig, ElaConfig, LoraConfig
from ardlora_ext.layers.expert_stacks import expert_stacks
from ardlora_ext.model.record import adapters
from ardlora_ext.ranks.attach import attach
from ardlora_ext.ranks.controllers.base import Controller
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply

Batch = dict[str, torch.Tensor]
Prepare = Callable[[nn.Module], nn.Module]
DROPOUT = 0.1
RECIPES = ("plain", "autocast", "trainer")
COMPILED = "-compiled"  # ends the name of what runs under torch.compile
STEPS = 10_000  # length of run that schedules are told
NOW = STEPS // 4  # every timed step is near: all methods move ranks then


def _llama(tokens: int, small: bool) -> tuple[nn.Module, Batch]:
    d = 256 if small else 1024
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=d,
        intermediate_size=d * 11 // 4,
        num_hidden_layers=2 if small else 4,
        num_attention_heads=d // 64,
        num_key_value_heads=d // 128,
    )
    ids = torch.randint(0, 512, (max(tokens // 128, 1), min(tokens, 128)))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def _encoder_sizes(small: bool) -> dict[str, int]:
    d, layers = (128, 2) if small else (384, 6)
    return {"hidden_size": d, "intermediate_size": 4 * d, "num_hidden_layers": layers}


def _bert(tokens: int, small: bool) -> tuple[nn.Module, Batch]:
    config = BertConfig(vocab_size=512, num_attention_heads=4 if small else 12, **_encoder_sizes(small))
    ids = torch.randint(0, 512, (max(tokens // 32, 1), min(tokens, 32)))
    return BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.zeros(len(ids), dtype=torch.long)}


def _vit(tokens: int, small: bool) -> tuple[nn.Module, Batch]:
    config = ViTConfig(num_attention_heads=2 if small else 6, image_size=112, patch_size=16, **_encoder_sizes(small))
    pixels = torch.randn(max(tokens // 50, 1), 3, 112, 112)
    labels = torch.zeros(len(pixels), dtype=torch.long)
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": labels}


def _decoder_sizes(small: bool) -> dict[str, int]:
    d = 128 if small else 512
    return {
        "vocab_size": 512,
        "hidden_size": d,
        "num_hidden_layers": 2,
        "num_attention_heads": d // 64,
        "num_key_value_heads": d // 64,
    }


def _ids(tokens: int) -> Batch:
    ids = torch.randint(0, 512, (max(tokens // 128, 1), min(tokens, 128)))
    return {"input_ids": ids, "labels": ids}


def _mixtral(tokens: int, small: bool) -> tuple[nn.Module, Batch]:
    experts = {"num_local_experts": 4 if small else 16, "num_experts_per_tok": 2, "intermediate_size": 1024}
    return MixtralForCausalLM(MixtralConfig(**_decoder_sizes(small), **experts)), _ids(tokens)


def _qwen3_moe(tokens: int, small: bool) -> tuple[nn.Module, Batch]:
    experts = {"num_experts": 8 if small else 64, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    sizes = {**_decoder_sizes(small), "head_dim": 64, "intermediate_size": 1024}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)), _ids(tokens)


MODELS: dict[str, Callable[[int, bool], tuple[nn.Module, Batch]]] = {
    "llama": _llama,
    "bert": _bert,
    "vit": _vit,
    "mixtral": _mixtral,
    "qwen3-moe": _qwen3_moe,
}
MIXTURES = ("mixtral", "qwen3-moe")
STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_NOT_ON_EXPERTS = ("peft-lora-dropout", "peft-adalora", "peft-dora")  # PEFT refuses them there


def fitting(model: str, names: list[str]) -> list[str]:
    """Return the implementations that there are for a model."""
    if model in MIXTURES:
        return [name for name in names if name not in _NOT_ON_EXPERTS and not name.endswith(COMPILED)]
    return [name for name in names if name != "ours-lora-ragged"]


def make_model(name: str, dtype: torch.dtype, tokens: int, small: bool) -> tuple[nn.Module, Batch]:
    """Return a model with random weights and a batch of about `tokens` rows; the same ones for the same arguments."""
    torch.manual_seed(0)
    model, batch = MODELS[name](tokens, small)
    model.to(dtype)
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def _ours(config: AdapterConfig) -> Prepare:
    return lambda model: wrap(model, config)


def _peft(kind: str, dropout: float, r: int) -> Prepare:
    def build(model: nn.Module) -> nn.Module:
        import peft

        targets: dict[str, Any] = {"target_modules": "all-linear", "lora_dropout": dropout}
        if expert_stacks(model):
            targets["target_parameters"] = STACKS
        if kind == "adalora":
            # Its allocator needs more to start with than in the end; 1.5 times is its paper's.
            config = peft.AdaLoraConfig(init_r=r + (r + 1) // 2, target_r=r, total_step=STEPS, **targets)
        else:
            config = peft.LoraConfig(r=r, use_dora=kind == "dora", **targets)
        wrapped: nn.Module = peft.get_peft_model(model, config)
        return wrapped

    return build


def _ragged(r: int) -> Prepare:
    """Ranks 0 to 2 r over the experts of each stack, as many components as `r` everywhere."""

    def build(model: nn.Module) -> nn.Module:
        wrap(model, LoraConfig(r=r))
        update = {}
        for name, layer in adapters(model).items():
            if layer.layout.kind == "experts":
                layer.max_rank = min(2 * r, layer.layout.max_rank)
                wanted = (2 * r * e // (layer.layout.units - 1) for e in range(layer.layout.units))
                update[name] = tuple(UnitUpdate(tuple(range(min(r, w))), max(w - r, 0)) for w in wanted)
        apply(model, RankUpdate(update))
        return model

    return build


def _compiled(prepare: Prepare) -> Prepare:
    def build(model: nn.Module) -> nn.Module:
        compiled: Any = torch.compile(prepare(model))
        return compiled  # type: ignore[no-any-return]

    return build


def implementations(r: int) -> dict[str, Prepare]:
    """Return how each implementation prepares a model, at rank `r` on all linear layers."""
    eager: dict[str, Prepare] = {
        "frozen": lambda model: model.requires_grad_(False),
        "ours-lora": _ours(LoraConfig(r=r)),
        "ours-lora-dropout": _ours(LoraConfig(r=r, lora_dropout=DROPOUT)),
        "ours-lora-ragged": _ragged(r),
        "ours-ard": _ours(ArdConfig(r0=r)),
        "ours-ela": _ours(ElaConfig(r=r, total_steps=STEPS)),
        "peft-lora": _peft("lora", 0.0, r),
        "peft-lora-dropout": _peft("lora", DROPOUT, r),
        "peft-adalora": _peft("adalora", 0.0, r),
        "peft-dora": _peft("dora", 0.0, r),
    }
    return eager | {f"{name}{COMPILED}": _compiled(eager[name]) for name in ("frozen", "ours-lora", "peft-lora")}


@dataclass
class Runner:
    """One implementation on one model; `step` is what a training step costs without the optimizer's arithmetic.

    Attributes:
        recipe: one of `RECIPES`: "autocast" runs the forward pass in bfloat16, as Trainer(bf16=True) does; "trainer" is
            Trainer's own step with that option, clipping included.
        allocate: what the method does about ranks after backward, or None.
        control: seconds of `allocate` in each step.
    """

    name: str
    model: nn.Module
    batch: Batch
    allocate: Callable[[], object] | None
    recipe: str = "plain"
    control: list[float] = field(default_factory=list)
    trained: Callable[[], torch.Tensor] | None = None  # forward, backward and clipping of the recipe "trainer"

    def forward(self) -> torch.Tensor:
        """Return the loss."""
        with torch.autocast(self.batch["labels"].device.type, torch.bfloat16, enabled=self.recipe == "autocast"):
            loss: torch.Tensor = self.model(**self.batch).loss
        return loss

    def step(self) -> None:
        """Run forward and backward, and what the method does about ranks."""
        if self.trained is not None:
            self.trained()
        else:
            self.forward().backward()  # type: ignore[no-untyped-call]
        if self.allocate is not None:
            began = time.perf_counter()
            self.allocate()
            self.control.append(time.perf_counter() - began)
        self.model.zero_grad(set_to_none=True)


def make_runner(name: str, base: nn.Module, batch: Batch, r: int, recipe: str = "plain") -> Runner:
    """Return an implementation on a copy of `base`, within a run: no factor is zero, ranks may move."""
    torch.manual_seed(0)
    model = implementations(r)[name](copy.deepcopy(base)).train()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    # So that the frozen base has a backward pass, too.
    enable: Any = getattr(model, "enable_input_require_grads")  # noqa: B009
    enable()
    trained = _trained(model, batch) if recipe == "trainer" else None
    return Runner(name, model, batch, _allocation(name, model), recipe, trained=trained)


def _trained(model: nn.Module, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return the step of transformers' Trainer in bfloat16, without its optimizer's."""
    from transformers import Trainer, TrainingArguments

    on_cpu = batch["labels"].device.type == "cpu"
    options: Any = {"bf16": True, "use_cpu": on_cpu, "report_to": [], "disable_tqdm": True}
    trainer: Any = Trainer(model, TrainingArguments(tempfile.gettempdir(), **options))
    trainer.current_gradient_accumulation_steps = 1  # its loop sets it
    prepared = trainer.accelerator.prepare_model(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> torch.Tensor:
        loss: torch.Tensor = trainer.training_step(prepared, dict(batch))
        trainer.accelerator.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        return loss

    return step


def _decide(controller: Controller[Any]) -> None:
    """Do what the hooks of `attach` do in an optimizer step, without its arithmetic."""
    controller.observe()
    controller.carry_out(controller.propose)


def _allocation(name: str, model: nn.Module) -> Callable[[], object] | None:
    if name in ("ours-ard", "ours-ela"):
        controller = attach(
            model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), total_steps=STEPS
        )
        controller.step = NOW
        return lambda: _decide(controller)
    if name == "peft-adalora":
        allocator: Any = model.base_model
        return lambda: allocator.update_and_allocate(NOW)
    return None
