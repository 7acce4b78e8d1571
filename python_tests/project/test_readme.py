"""The README says what is true: its formula is what a layer computes, its commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_equivalent_formula_is_what_the_layer_computes() -> None:
    from ardlora_ext.native import ops
    from ardlora_ext.native.units import UnitLayout

    scope: dict[str, object] = {"torch": torch}
    exec(next(b for b in BLOCKS if "def lora_linear" in b), scope)
    formula = scope["lora_linear"]
    assert callable(formula)
    x, w, bias, a, b, gate = (torch.randn(*s) for s in ((5, 12), (9, 12), (9,), (3, 12), (3, 9), (3,)))
    table = UnitLayout("matrix", "shared", 1, 12, 9).encode([3])
    torch.testing.assert_close(
        ops.lora_linear(x, w, bias, a, b, gate, table, 0.5), formula(x, w, bias, a, b, gate, 0.5)
    )


def test_commands_are_marked_and_make_their_own_environment() -> None:
    for name in ("main", "tests"):
        found = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", README, re.DOTALL)
        assert found, name
        assert found.group(1).startswith("python3 -m venv ")
        assert "\n" not in found.group(1), "one command"


def test_versions_agree() -> None:
    import ardlora_ext
    from ardlora_ext.native.compiled import core

    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project
    assert ardlora_ext.__version__ == core.__version__ == project.group(1)
