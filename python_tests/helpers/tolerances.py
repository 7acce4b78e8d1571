"""How far a kernel may be from the float64 reference: twice torch's own error at that dtype, plus a floor.

The floor covers results where torch happens to be exact: a few roundings of the storage type, relative to the largest
value of the result; in float32 some more, because dA of one row and one rank is a single cancelling sum times x.
"""

from __future__ import annotations

import torch

ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_close_to_reference(
    ours: torch.Tensor, torch_result: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, what: str
) -> None:
    """Assert max |ours - reference| <= 2 max |torch - reference| + floor * max |reference|."""
    assert ours.shape == reference.shape, f"{what}: shape {list(ours.shape)} instead of {list(reference.shape)}"
    if reference.numel() == 0:
        return
    error = (ours.double() - reference).abs().max().item()
    theirs = (torch_result.double() - reference).abs().max().item()
    bound = 2.0 * theirs + FLOOR[dtype] * reference.abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g} is above {bound:.3g} (torch's own: {theirs:.3g})"
