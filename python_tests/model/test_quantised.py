"""Bases that are not dense: torchao's and bitsandbytes' weights on the CPU, and layers known only by their sizes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ardlora_ext as ard

from helpers.adapters import scramble
from helpers.models import trainable

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

WIDTH = 256


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


class PackedLinear(nn.Module):
    """As GPTQ and AWQ layers: two 4-bit codes in a byte, scales of groups, sizes as attributes, no `weight`."""

    def __init__(self, dense: nn.Linear, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = dense.in_features, dense.out_features, group
        grouped = dense.weight.detach().float().view(self.out_features, -1, group)
        scales = grouped.abs().amax(-1, keepdim=True) / 7
        codes = (grouped / scales).round().to(torch.int8).view(self.out_features, -1) + 8
        self.register_buffer("qweight", (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8))
        self.register_buffer("scales", scales.squeeze(-1))
        self.register_buffer("bias", dense.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([self.qweight >> 4, self.qweight & 15], dim=-1).view(self.out_features, -1, self.group)
        weight = ((codes.float() - 8) * self.scales[:, :, None]).view(self.out_features, -1).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias.to(x.dtype))


def packed(dense: nn.Linear) -> nn.Module:
    return PackedLinear(dense)


def torchao(config: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(dense: nn.Linear) -> nn.Module:
        kind = library("torchao.quantization")
        holder = nn.Sequential(dense)
        kind.quantize_(holder, getattr(kind, config)(**options))
        return holder[0]

    return quantise


def bitsandbytes(kind: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(dense: nn.Linear) -> nn.Module:
        made = getattr(library("bitsandbytes").nn, kind)(WIDTH, WIDTH, **options)
        made.load_state_dict(dense.state_dict())
        return made.to("cpu").to(dense.weight.dtype) if kind == "Linear8bitLt" else made.to("cpu")

    return quantise


BASES: dict[str, tuple[Callable[[nn.Linear], nn.Module], float]] = {  # and bytes per weight, scales included
    "torchao int8": (torchao("Int8WeightOnlyConfig"), 1.02),
    "torchao int8 dynamic": (torchao("Int8DynamicActivationInt8WeightConfig"), 1.02),
    "torchao int4": (torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), 1.2),  # unpacked on the CPU
    "torchao float8": (torchao("Float8WeightOnlyConfig"), 1.02),
    "bitsandbytes int8": (bitsandbytes("Linear8bitLt", has_fp16_weights=False), 1.02),
    "bitsandbytes nf4": (bitsandbytes("Linear4bit", quant_type="nf4"), 0.6),
    "bitsandbytes fp4": (bitsandbytes("Linear4bit", quant_type="fp4", compress_statistics=True), 0.6),
    "packed int4": (packed, 0.65),
}


@pytest.fixture(params=list(BASES))
def base(request: pytest.FixtureRequest) -> tuple[str, Callable[[nn.Linear], nn.Module]]:
    return request.param, BASES[request.param][0]


def wrapped(quantise: Callable[[nn.Linear], nn.Module], dtype: torch.dtype, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(quantise(nn.Linear(WIDTH, WIDTH).to(dtype)))
    return ard.wrap(
        model, ard.ArdConfig(**{"mode": "paper", "r0": 3, "granularity": "matrix", "target_modules": ["0"], **options})
    )


def dense_of(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that a linear layer acts by, as [K, N] float32."""
    eye = torch.eye(WIDTH, dtype=dtype)
    return (layer(eye) - layer(torch.zeros_like(eye))).detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_those_of_the_decoded_weight(base: Any, dtype: torch.dtype) -> None:
    name, quantise = base
    model = wrapped(quantise, dtype)
    layer = ard.adapters(model)["0"]
    x = torch.randn(5, WIDTH).to(dtype)
    assert torch.equal(model(x), layer.base_layer(x)), "the adapter starts at zero"
    scramble(model)
    update, bias = layer.get_delta_weight().T, layer.base_layer.bias.detach().float()
    weight = dense_of(layer.base_layer, dtype)
    # A dynamically quantised activation is not linear in x, but nearly.
    bound = (0.05 if "dynamic" in name else 1e-4) if dtype == torch.float32 else 0.05
    x.requires_grad_()
    y = model(x)
    expected = x.detach().float() @ (weight + update) + bias
    assert (y.float() - expected).norm() < bound * expected.norm()
    dy = torch.randn_like(y)
    y.backward(dy)
    dx = dy.float() @ (weight + update).T
    assert x.grad is not None
    assert (x.grad.float() - dx).norm() < bound * dx.norm()

    h = x.detach().float().requires_grad_()  # adapters' gradients against autograd on the same numbers
    a, b = (p.detach().float().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    rows = sum(layer.ranks)
    assert layer.gate is not None
    ((h @ a[:rows].T * layer.gate[:rows]) @ b[:rows] * layer.scaling).backward(dy.float())
    for ours, theirs in ((layer.lora_A, a), (layer.lora_B, b)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() < (1e-5 if dtype == torch.float32 else 0.02) * theirs.grad.norm()
    assert all(p.grad is None for p in layer.base_layer.parameters())


def test_merge_is_refused_and_says_what_to_do(base: Any) -> None:
    model = wrapped(base[1], torch.float32)
    scramble(model)
    x = torch.randn(3, WIDTH)
    before = model(x)
    for merge in (ard.merge, ard.merge_adapter):
        with pytest.raises(
            ValueError, match=r"'0' must have a plain floating-point weight, got .*; save the adapter and merge it"
        ):
            merge(model)
    assert torch.equal(model(x), before)
    for config in (ard.DoraConfig(target_modules=["0"]), ard.LoraConfig(target_modules=["0"], init="pissa")):
        with pytest.raises(ValueError, match="needs base layers with a dense weight, got"):
            ard.wrap(nn.Sequential(base[1](nn.Linear(WIDTH, WIDTH))), config)


def test_ranks_move_and_runs_resume(base: Any, tmp_path: Path) -> None:
    ends = []
    for parts in ([range(12)], [range(7), range(7, 12)]):
        for part in parts:
            model = wrapped(base[1], torch.float32, update_interval=2, lr_alpha=0.1, freeze_ratio=0.2)
            optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
            controller = ard.attach(model, optimizer, total_steps=12)
            if part.start:
                ard.load_state(model, optimizer, tmp_path)
            for t in part:
                x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(t))
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            ard.save_state(model, optimizer, tmp_path)
        assert controller.records
        ends.append((controller.ranks(), ard.adapters(model)["0"].get_delta_weight()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
    ard.save_pretrained(model, tmp_path / "adapter")
    written = sum(file.stat().st_size for file in tmp_path.glob("ardlora_resume.safetensors"))
    assert written < 16 * ard.parameters_report(model).allocated + 20_000, "the frozen weight is in no file"


def test_bytes(base: Any) -> None:
    """The frozen weight is held once, in its few bits; a layer keeps no decoded copy of it for backward."""
    name, quantise = base
    model = wrapped(quantise, torch.float32)
    layer = ard.adapters(model)["0"]
    x = torch.randn(64, WIDTH, requires_grad=True)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _storages(layer.base_layer)}
    per_weight = (sum(held.values()) - 4 * WIDTH) / WIDTH**2
    assert per_weight < BASES[name][1]
    if name.startswith("torchao"):
        known = {id(t) for t in (x, *layer.parameters(), *layer.buffers(), layer.rank_table)}
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
            layer(x)
        own = [t for t in saved if id(t) not in known and t.data_ptr() != x.data_ptr()]  # x may come as an alias
        assert sum(t.nbytes for t in own) == 4 * 64 * len(layer.lora_A), "H"


def _storages(module: nn.Module) -> list[torch.Tensor]:
    """Return the plain tensors that a module's parameters and buffers consist of."""
    found: list[torch.Tensor] = []
    for tensor in [*module.parameters(), *module.buffers()]:
        quantised = getattr(tensor, "quant_state", None)
        found += [] if quantised is None else [v for v in vars(quantised).values() if isinstance(v, torch.Tensor)]
        found += [v for v in (getattr(tensor, "CB", None), getattr(tensor, "SCB", None)) if v is not None]
        if hasattr(tensor, "__tensor_flatten__"):
            found += [getattr(tensor, inner) for inner in tensor.__tensor_flatten__()[0]]
        else:
            found.append(tensor.data)
    return found


def test_a_copy_is_wrapped_alike(base: Any) -> None:
    model = wrapped(base[1], torch.float32)
    x = torch.randn(2, WIDTH)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_evaluation_does_not_take_the_gradient_away() -> None:
    """bitsandbytes packs 4-bit weights for CPUs with bfloat16 in evaluation; packed ones have no gradient."""
    quantise = bitsandbytes("Linear4bit", quant_type="nf4")
    base = nn.Sequential(*[quantise(nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
    packs = [getattr(layer, "support_avx512bf16_for_cpu", None) for layer in base]
    model = ard.wrap(base, ard.LoraConfig(r=2, target_modules=["0", "1"]))
    for layer in ard.adapters(model).values():
        nn.init.normal_(layer.lora_B)
    x, found = torch.randn(4, WIDTH), []
    for _ in range(2):
        model.train()
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            model(x)
    assert len(found[0]) == 4
    assert all(map(torch.equal, *found))
    with ard.disable_adapter(model):
        assert [getattr(layer, "support_avx512bf16_for_cpu", None) for layer in model] == packs
