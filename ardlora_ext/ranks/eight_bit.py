"""8-bit moments: value = qmap[code] * scale, one scale for each block of values in memory order (arXiv:2110.02861).

bitsandbytes keeps `state1` (uint8, the parameter's shape), `absmax1` and `qmap1`, and so on for 2; torchao one
`OptimState8bit`. Where rows are whole blocks, codes and scales move with them. Elsewhere a block has values of several
rows: blocks that stay what they were keep their bits, the others are decoded and encoded again.

bitsandbytes' paged optimizers keep large moments, of 8 bit or 32, in managed memory: tensors of the CPU with two
attributes more, `is_paged` and `page_deviceid`, without which the next step refuses them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

_BLOCKS = (256, 2048)  # of bitsandbytes, now and in versions before 0.44
_TINY = 1e-38
_TORCHAO, _TORCHAO_PARTS = "OptimState8bit", ("codes", "scale", "qmap")


@dataclass(frozen=True)
class EightBit:
    """A moment of one parameter.

    Attributes:
        codes: [rows, width] uint8.
        scale: [blocks] float32.
        qmap: [256] ascending, what the codes mean.
        block: values that share a scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    qmap: torch.Tensor
    block: int

    def decode(self) -> torch.Tensor:
        """Return the values [rows, width] float32."""
        values = self.qmap[self.codes.long()].view(-1)
        return (values * self.scale.repeat_interleave(self.block)[: len(values)]).view(self.codes.shape)

    def gather(self, plan: list[int]) -> EightBit:
        """Return the moment whose row i is row `plan[i]` of this one; -1 gives a row that decodes to exact zeros."""
        rows, width = self.codes.shape
        source = torch.tensor(plan, dtype=torch.int64, device="cpu").to(self.codes.device, non_blocking=True)
        if width % self.block == 0:
            codes = F.pad(self.codes, (0, 0, 0, 1))[source]  # -1 is the row added last
            scale = F.pad(self.scale.view(rows, width // self.block), (0, 0, 0, 1))[source]
            return EightBit(codes, scale.reshape(-1), self.qmap, self.block)
        within = torch.arange(width, device=source.device)
        flat = torch.where(source[:, None] < 0, -1, source[:, None] * width + within).view(-1)
        return self._gather(flat, (len(plan), width))

    def _gather(self, source: torch.Tensor, shape: tuple[int, int]) -> EightBit:
        """Take value `source[i]`, or 0 for -1, to place i."""
        blocks = math.ceil(len(source) / self.block)
        padding = blocks * self.block - len(source)
        places = F.pad(source, (0, padding), value=-1).view(blocks, self.block)
        first = places[:, :1]
        follows = places == first + torch.arange(self.block, device=places.device)
        follows.view(-1)[len(source) :] = True
        same = follows.all(1, keepdim=True) & (first >= 0) & (first % self.block == 0)
        values = torch.where(places < 0, 0.0, self.decode().view(-1)[places.clamp(min=0)])
        largest = values.abs().amax(1, keepdim=True)
        fresh = self._encode(values / largest.clamp(min=_TINY))
        codes = torch.where(same, self.codes.view(-1)[places.clamp(min=0)], fresh).view(-1)[: len(source)]
        scale = torch.where(same, self.scale[(first // self.block).clamp(min=0)], largest).view(-1)
        return EightBit(codes.view(shape), scale, self.qmap, self.block)

    def with_values(self, values: torch.Tensor) -> EightBit:
        """Return the moment of these values [rows, width] float32 in the same map and blocks."""
        flat = values.reshape(-1)
        blocks = F.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)
        largest = blocks.abs().amax(1, keepdim=True)
        codes = self._encode(blocks / largest.clamp(min=_TINY)).view(-1)[: len(flat)]
        return EightBit(codes.view(values.shape), largest.view(-1), self.qmap, self.block)

    def _encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes of values in [-1, 1]. 0 stays 0, and in a map without signs only 0 becomes 0.

        A second moment that is rounded to 0 beside a first one that is not would be divided by eps.
        """
        codes = torch.bucketize(values, (self.qmap[1:] + self.qmap[:-1]) / 2)
        if _zero_code(self.qmap) == 0:
            codes = torch.where((values > 0) & (codes == 0), 1, codes)
        return codes.to(torch.uint8)


_zero_codes: Any = WeakIdKeyDictionary()  # of maps that were looked at: on a GPU a look waits, and moments share maps


def _zero_code(qmap: torch.Tensor) -> int:
    """Return the code of 0.

    Raises:
        ValueError: there is none.
    """
    if qmap not in _zero_codes:
        zeros = torch.nonzero(qmap == 0.0)
        if len(zeros) == 0:
            raise ValueError("rank change: 8-bit optimizer state must have a code for 0, got a map without")
        _zero_codes[qmap] = int(zeros[0])
    return int(_zero_codes[qmap])


def find(state: Mapping[str, Any]) -> dict[str, EightBit]:
    """Return the 8-bit moments among a parameter's optimizer state, by the key of their codes.

    Raises:
        ValueError: a block size is not known.
    """
    found = {}
    for key, value in state.items():
        number = key.removeprefix("state")
        if type(value).__name__ == _TORCHAO:
            found[key] = EightBit(value.codes, value.scale, value.qmap, int(value.block_size))
        elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and f"absmax{number}" in state:
            scale, qmap = state[f"absmax{number}"], state[f"qmap{number}"]
            sizes = [size for size in _BLOCKS if math.ceil(value.numel() / size) == scale.numel()]
            if value.dim() != 2 or not sizes:
                raise ValueError(
                    f"rank change: 8-bit optimizer state '{key}' must be [rows, width] in blocks of "
                    f"{' or '.join(map(str, _BLOCKS))} values, got {list(value.shape)} and {scale.numel()} scales"
                )
            found[key] = EightBit(value, scale, qmap, sizes[0])
    return found


def flattened(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's optimizer state as plain values, dotted keys for what is in a dict or in torchao's type."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if type(value).__name__ == _TORCHAO:
            value = {name: getattr(value, name) for name in _TORCHAO_PARTS}
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def unflattened(entry: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Rebuild what `flattened` took apart, for a parameter of this dtype.

    Raises:
        ModuleNotFoundError: it was torchao's, which is not installed.
    """
    found: dict[str, Any] = {}
    for key, value in entry.items():
        outer, dot, inner = key.partition(".")
        if dot:
            found.setdefault(outer, {})[inner] = value
        else:
            found[key] = value
    for key, value in found.items():
        if isinstance(value, dict) and value.keys() == set(_TORCHAO_PARTS):
            types: Any = importlib.import_module("torchao.optim.subclass_8bit")
            found[key] = types.OptimState8bit(**value, signed=bool((value["qmap"] < 0).any()), dtype=dtype)
    return found


def parts(key: str) -> tuple[str, ...]:
    """Return the keys of the state that belong to the moment `key`."""
    number = key.removeprefix("state")
    return (key,) if number == key else (key, f"absmax{number}", f"qmap{number}")


def stored(state: Mapping[str, Any], key: str, moment: EightBit) -> dict[str, Any]:
    """Return the entries that put a moment where `find` found it."""
    old = state[key]
    if type(old).__name__ != _TORCHAO:
        return {key: placed(old, moment.codes), f"absmax{key.removeprefix('state')}": moment.scale}
    if moment.codes.numel() % moment.block:  # torchao keeps those in full precision
        return {key: moment.decode().to(old.dtype)}
    return {key: type(old)(moment.codes, moment.scale, moment.qmap, old.signed, old.dtype)}


def empty_as(old: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a new tensor of this shape in the memory and dtype of `old`."""
    if not getattr(old, "is_paged", False):
        return old.new_empty(shape)
    functional: Any = importlib.import_module("bitsandbytes.functional")
    device = torch.device("cuda", old.page_deviceid)  # type: ignore[attr-defined]
    made: torch.Tensor = functional.get_paged(*shape, dtype=old.dtype, device=device)
    return made


def placed(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return these values in the memory of `old`."""
    return empty_as(old, values.shape).copy_(values) if getattr(old, "is_paged", False) else values
