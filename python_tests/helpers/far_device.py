"""A device of fake tensors that stands for a CUDA device: an operation that mixes it with the CPU raises, as it would.

`FakeTensorMode` knows where every tensor is, but holds no numbers: reading one on the host gives ones here. Addresses
tell where a tensor is, so that native calls can be checked by what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.start import fresh
from ardlora_ext.native import dispatch, grouped, transfers, units
from ardlora_ext.native.compiled import core
from ardlora_ext.native.prepared import Prepared
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks import row_moves
from ardlora_ext.ranks.controllers.ard import gates

FAR = torch.device("meta")  # FakeTensorMode treats it as a device like others; a CPU build of torch knows no fake CUDA
_FIRST = 1 << 50  # addresses from here on are there
_TYPES = (torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8)
_NUMPY = {dtype: torch.zeros((), dtype=dtype).numpy().dtype for dtype in _TYPES}


def _values(tensor: Tensor) -> NDArray[Any]:
    known = getattr(tensor, "constant", None)  # of small tensors that were made of Python numbers
    with no_dispatch():
        return np.ones(tensor.shape, dtype=_NUMPY[tensor.dtype]) if known is None else known.numpy().copy()


def _numpy(tensor: Tensor) -> NDArray[Any]:
    if tensor.device == FAR:
        raise TypeError("a tensor of a CUDA device must be copied by Tensor.cpu() before it is a numpy array")
    return _values(tensor)


_HOST: dict[Any, Callable[..., Any]] = {
    Tensor.data_ptr: lambda t: 4096 + _FIRST * (t.device == FAR),
    Tensor.numpy: _numpy,
    Tensor.item: lambda t: _values(t).item(),
    Tensor.tolist: lambda t: _values(t).tolist(),
    torch.equal: lambda *_: True,
    Tensor.__float__: lambda t: float(_values(t)),
    Tensor.__int__: lambda t: int(_values(t)),
    Tensor.__bool__: lambda t: bool(_values(t).all()),
}


class Waits:
    """Where the host would wait for a GPU: [the step, what it did], reads of what was asked for earlier left out.

    A test counts the steps on.
    """

    def __init__(self) -> None:
        self.step, self.seen, self._quiet = 0, list[tuple[int, str]](), False

    def note(self, what: str) -> None:
        if not self._quiet:
            self.seen.append((self.step, what))

    def queued(self, flat: Tensor) -> tuple[Tensor, Any]:
        """Stand for `transfers._queued`: a copy and its event."""
        self._quiet = True
        try:
            copy = flat.cpu()
        finally:
            self._quiet = False
        asked = self.step
        read = lambda: self.note("an answer in the step that asks") if self.step == asked else None  # noqa: E731
        return copy, SimpleNamespace(synchronize=read)


class _Fakes(FakeTensorMode):
    """Fake tensors; notes copies that are waited for, and results whose size only the device knows."""

    def __init__(self, waits: Waits) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.overloadpacket.__name__, kwargs or {}
        if name == "_to_copy" and FAR in (args[0].device, options.get("device")):
            if args[0].device != (options.get("device") or args[0].device) and not options.get("non_blocking"):
                self.waits.note("a copy")
        elif name == "copy_" and args[0].device != args[1].device and not (args[2:] and args[2]):
            self.waits.note("a copy")
        elif name in ("nonzero", "masked_select", "repeat_interleave") and args[0].device == FAR:
            self.waits.note(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


_READS = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__, torch.equal)


class _Host(TorchFunctionMode):
    """Gives what is read on the host."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _HOST:
            return func(*args, **(kwargs or {}))
        if isinstance(args[0], FakeTensor):
            if func in _READS and args[0].device == FAR:
                self.waits.note(func.__name__)
            return _HOST[func](*args)
        with no_dispatch():
            return func(*args, **(kwargs or {}))


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move a module by new parameters: torch would swap fake ones, which their views forbid."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(fn(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


def _there(addresses: NDArray[np.int64], device: torch.device) -> None:
    assert device == FAR
    assert (addresses >= _FIRST).all(), "a native call on the device was given memory of the host"


def _row_dots(blocks: NDArray[np.int64], _dtype: torch.dtype, device: torch.device) -> Tensor:
    _there(blocks[:, :2], device)
    return torch.ones(int(blocks[:, 2].sum()), device=FAR)


def _importance(blocks: NDArray[np.int64], _beta1: float, _beta2: float, device: torch.device) -> Tensor:
    _there(blocks[:, :4], device)
    return torch.ones((), device=FAR)


def _rank_resize(moves: NDArray[np.int64], _plans: Any, device: torch.device) -> Callable[[], None]:
    _there(moves[:, :2], device)
    return lambda: None


def _set_gates(blocks: NDArray[np.int64], rho: Any, kind: int, floor: float, width: float, device: Any) -> None:
    if device == FAR:
        _there(blocks[:, 0], device)
    else:
        core.set_gates(blocks, rho, kind, floor, width)


def _prepared(_self: Any, _op: str, *adapter: Any) -> Any:
    *tensors, rank_table, _scaling = adapter
    _all_there(*tensors)
    table = SimpleNamespace(units=rank_table.numel() - 4, hidden=8)  # after kind, factoring and sizes
    return SimpleNamespace(table=table, device=FAR, on_cuda=True)


def _all_there(*tensors: Tensor | None) -> None:  # nodes of autograd run outside `_Host`, which knows addresses
    assert {t.device for t in tensors if t is not None} == {FAR}


def _grouped_forward(native: Any, x: Tensor, y: Tensor, by_expert: dispatch.Sorted, _dropout: Any) -> Tensor:
    _all_there(x, y, *by_expert)
    return x.new_empty(len(x), native.table.hidden)


def _grouped_backward(_native: Any, *arguments: Any) -> None:
    *tensors, by_expert, _dropout = arguments
    _all_there(*tensors, *by_expert)


def _table(layer: LoraLinear) -> core.UnitTable:
    lay = layer.layout
    codes = units._KIND_CODES[lay.kind], units._FACTORING_CODES[lay.factoring]
    return core.UnitTable(*codes, lay.in_features, lay.out_features, layer.ranks)


_encode = UnitLayout.encode


def _encoded(layout: UnitLayout, ranks: Sequence[int]) -> Tensor:
    with no_dispatch():
        return _encode(layout, ranks)


@contextmanager
def far_device() -> Iterator[Waits]:
    """Let tensors be made on, and moved to, `FAR`, and let our kernels run there without a result.

    Yields where the host would have waited for it.
    """
    waits = Waits()
    with (
        mock.patch.object(dispatch, "_on_cuda", lambda device: device == FAR),
        mock.patch.object(dispatch, "core", SimpleNamespace(cuda_built=lambda: True, cuda_problem=lambda _device: "")),
        mock.patch.object(Prepared, "get", _prepared),
        mock.patch.object(grouped, "lora_grouped_forward", _grouped_forward),
        mock.patch.object(grouped, "lora_grouped_backward", _grouped_backward),
        mock.patch.object(dispatch, "row_dots", _row_dots),
        mock.patch.object(dispatch, "importance", _importance),
        mock.patch.object(row_moves, "rank_resize", _rank_resize),
        mock.patch.object(gates, "set_gates", _set_gates),
        mock.patch.object(
            fresh, "core", SimpleNamespace(orthogonal_rows=lambda *_: None, draw_uniform=lambda *_: None)
        ),
        mock.patch.object(UnitLayout, "encode", _encoded),
        mock.patch.object(LoraLinear, "table", property(_table)),  # hooks of backward() run outside `_Host`
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # torch does not ask it of this device
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(transfers, "_queued", waits.queued),
        _Fakes(waits),
        _Host(waits),
    ):
        yield waits
