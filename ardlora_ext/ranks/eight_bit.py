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
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from ardlora_ext.native.transfers import Fetched, sent

_BLOCKS = (256, 2048)  # of bitsandbytes, now and in versions before 0.44
_TINY = 1e-38
_TOGETHER = 1 << 21  # values that move together: a few of 8 bytes are made for each
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
        return _Stack.of([self]).decode()[0]

    def gather(self, plan: Sequence[int]) -> EightBit:
        """Return the moment whose row i is row `plan[i]` of this one; -1 gives a row that decodes to exact zeros."""
        return gathered([self], [plan])[0]

    def with_values(self, values: torch.Tensor) -> EightBit:
        """Return the moment of these values [rows, width] float32 in the same map and blocks."""
        _check_maps([self])
        flat = values.reshape(1, -1)
        blocks = F.pad(flat, (0, -flat.shape[1] % self.block)).view(1, -1, self.block)
        largest = blocks.abs().amax(2, keepdim=True)
        codes = _encoded(blocks / largest.clamp(min=_TINY), self.qmap[None]).view(-1)[: flat.shape[1]]
        return EightBit(codes.view(values.shape), largest.view(-1), self.qmap, self.block)


class _Stack(NamedTuple):
    """Moments of one shape, device and block."""

    codes: torch.Tensor  # [moments, rows, width]
    scale: torch.Tensor  # [moments, blocks]
    qmap: torch.Tensor  # [moments, 256]
    block: int

    @classmethod
    def of(cls, moments: Sequence[EightBit]) -> _Stack:
        codes, scale, qmap = ([getattr(m, name) for m in moments] for name in ("codes", "scale", "qmap"))
        return cls(torch.stack(codes), torch.stack(scale), torch.stack(qmap), moments[0].block)

    def decode(self) -> torch.Tensor:
        """Return the values [moments, rows, width] float32."""
        values = self.qmap.gather(1, self.codes.view(len(self.codes), -1).long())
        scale = self.scale.repeat_interleave(self.block, dim=1)[:, : values.shape[1]]
        return (values * scale).view(self.codes.shape)

    def rows(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales of rows that are whole blocks, for `source` [moments, new rows]."""
        n, rows, width = self.codes.shape
        row = torch.where(source < 0, rows, source) + (rows + 1) * torch.arange(n, device=source.device)[:, None]
        codes = F.pad(self.codes, (0, 0, 0, 1)).view(-1, width)[row]  # the last row is zeros
        scale = F.pad(self.scale.view(n, rows, -1), (0, 0, 0, 1)).view(n * (rows + 1), -1)[row]
        return codes, scale.view(n, -1)

    def values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales where blocks have values of several rows, for `source` [moments, new rows]."""
        (n, _, width), new = self.codes.shape, source.shape[1]
        within = torch.arange(width, device=source.device)
        flat = torch.where(source[..., None] < 0, -1, source[..., None] * width + within).view(n, -1)
        count = flat.shape[1]
        blocks = math.ceil(count / self.block)
        places = F.pad(flat, (0, blocks * self.block - count), value=-1).view(n, blocks, self.block)
        first, at = places[..., :1], places.clamp(min=0).view(n, -1)
        follows = places == first + torch.arange(self.block, device=places.device)
        follows.view(n, -1)[:, count:] = True
        same = follows.all(2, keepdim=True) & (first >= 0) & (first % self.block == 0)
        values = torch.where(places < 0, 0.0, self.decode().view(n, -1).gather(1, at).view(places.shape))
        largest = values.abs().amax(2, keepdim=True)
        fresh = _encoded(values / largest.clamp(min=_TINY), self.qmap)
        old = self.codes.view(n, -1).gather(1, at).view(places.shape)
        before = self.scale.gather(1, (first // self.block).clamp(min=0).view(n, -1))
        codes = torch.where(same, old, fresh).view(n, -1)[:, :count].reshape(n, new, width)
        return codes, torch.where(same.view(n, -1), before, largest.view(n, -1))


def gathered(moments: Sequence[EightBit], plans: Sequence[Sequence[int]]) -> list[EightBit]:
    """Return `moment.gather(plan)` of each: moments of one shape together, the plans in one copy to each device.

    Raises:
        ValueError: a map has no code for 0.
    """
    places: dict[torch.device, list[int]] = {}
    for i, moment in enumerate(moments):
        places.setdefault(moment.codes.device, []).append(i)
    sources: dict[int, torch.Tensor] = {}
    for device, there in places.items():
        rows = np.array([row for i in there for row in plans[i]], dtype=np.int64)
        parts = torch.split(sent(rows, device), [len(plans[i]) for i in there])
        sources |= dict(zip(there, parts, strict=True))
    _check_maps([m for m in moments if m.codes.shape[1] % m.block])
    alike: dict[Hashable, list[int]] = {}
    for i, moment in enumerate(moments):
        codes = moment.codes
        alike.setdefault((codes.shape, codes.device, moment.block, len(plans[i]), len(moment.qmap)), []).append(i)
    found = dict[int, EightBit]()
    for same in alike.values():
        first = moments[same[0]].codes
        most = max(1, _TOGETHER // max(first.numel(), 1))
        for begin in range(0, len(same), most):
            chunk = same[begin : begin + most]
            stack, source = _Stack.of([moments[i] for i in chunk]), torch.stack([sources[i] for i in chunk])
            codes, scale = (stack.values if first.shape[1] % stack.block else stack.rows)(source)
            for i, c, s in zip(chunk, _apart(codes), _apart(scale), strict=True):
                found[i] = EightBit(c, s, moments[i].qmap, moments[i].block)
    return [found[i] for i in range(len(moments))]


def _apart(stack: torch.Tensor) -> list[torch.Tensor]:
    """Return the parts of a stack, each in memory of its own."""
    parts = [torch.empty_like(part) for part in stack]
    torch._foreach_copy_(parts, list(stack.unbind()))
    return parts


def _encoded(values: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes [n, ...] of values in [-1, 1], by maps [n, 256].

    0 stays 0, and in a map without signs only 0 becomes 0: a second moment that is rounded to 0 beside a first one that
    is not would be divided by eps.
    """
    flat = values.reshape(len(values), -1)
    codes = torch.searchsorted((qmap[:, 1:] + qmap[:, :-1]) / 2, flat)
    codes = torch.where((flat > 0) & (codes == 0) & (qmap[:, :1] == 0), 1, codes)
    return codes.to(torch.uint8).view(values.shape)


_good_maps: Any = WeakIdKeyDictionary()  # that were looked at: on a GPU a look waits


def _check_maps(moments: Sequence[EightBit]) -> None:
    """Check that the maps of these moments have a code for 0; one look for all that are new.

    Raises:
        ValueError: one has none.
    """
    new = list({id(m.qmap): m.qmap for m in moments if m.qmap not in _good_maps}.values())
    if not all(map(bool, Fetched([(qmap == 0.0).any() for qmap in new]).values())):
        raise ValueError("rank change: 8-bit optimizer state must have a code for 0, got a map without")
    for qmap in new:
        _good_maps[qmap] = True


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


def empty_as(old: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return a new tensor of this shape in the memory and dtype of `old`."""
    if not getattr(old, "is_paged", False):
        return old.new_empty(*shape)
    functional: Any = importlib.import_module("bitsandbytes.functional")
    device = torch.device("cuda", old.page_deviceid)  # type: ignore[attr-defined]
    made: torch.Tensor = functional.get_paged(*shape, dtype=old.dtype, device=device)
    return made


def placed(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return these values in the memory of `old`."""
    return empty_as(old, *values.shape).copy_(values) if getattr(old, "is_paged", False) else values
