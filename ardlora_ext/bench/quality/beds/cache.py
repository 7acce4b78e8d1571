"""Models that a bed trains once per seed, kept in the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from safetensors.torch import load_file, save_file
from torch import nn

from ardlora_ext.train.packages import cache_dir


def cached(
    bed: str, settings: Mapping[str, object], seed: int, models: Mapping[str, nn.Module], train: Callable[[], None]
) -> None:
    """Load the weights of `models` (by the name of their file), or let `train` make them and keep what it made.

    Args:
        bed: whose models they are.
        settings: of the bed, as far as the weights depend on them.
        seed: of the task.
        models: are filled in place.
        train: trains them where no cache has them all.
    """
    key = hashlib.sha256(f"{sorted(settings.items())}/{seed}".encode()).hexdigest()[:16]
    folder = cache_dir() / "bench"
    files = {part: folder / f"{bed}-{key}-{part}.safetensors" for part in models}
    if all(file.is_file() for file in files.values()):
        for part, model in models.items():
            model.load_state_dict(load_file(files[part]))
        return
    train()
    folder.mkdir(parents=True, exist_ok=True)
    for part, model in models.items():
        partial = files[part].with_suffix(".part")  # a cached file is whole or absent
        save_file(model.state_dict(), partial)
        partial.replace(files[part])
