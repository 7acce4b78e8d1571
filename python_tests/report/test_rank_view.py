"""`controller.show()`: a table in a terminal, a picture in a notebook."""

from __future__ import annotations

import base64
import re
import sys

import pytest
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.report.rank_view import RankView

from helpers.run_files import ranks_of


def test_table_has_the_mean_of_each_kind_in_each_layer() -> None:
    ranks = {**ranks_of(1, 9), "classifier": [3]}
    ranks["bert.encoder.layer.1.attention.self.query"] = [8, 8, 9, 10]
    title, *table = repr(RankView("now", ranks)).splitlines()
    assert title == "now"
    assert [line.split() for line in table] == [
        ["layer", "query", "attention.output", "intermediate", "output", "classifier", "mean"],
        ["0", "1.0", "1.0", "1.0", "1.0", "1.0"],
        ["1", "8.8", "9.0", "9.0", "9.0", "8.9"],
        ["other", "3.0", "3.0"],
    ]
    assert len(set(map(len, table))) == 1


def test_notebook_gets_the_heat_map(monkeypatch: pytest.MonkeyPatch) -> None:
    view = RankView("a < b", ranks_of(1, 9))
    page = view._repr_html_()
    found = re.fullmatch(r'<p>a &lt; b</p><img src="data:image/png;base64,([^"]+)" alt="a &lt; b"[^>]*>', page)
    assert found is not None
    assert base64.b64decode(found[1]).startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "ardlora_ext.report.plots", None)  # as where matplotlib is not installed
    assert view._repr_html_().startswith("<pre>a &lt; b\n")


@pytest.mark.parametrize("config", [ard.ArdConfig(r0=2), ard.LoraConfig(r=3)], ids=["ard", "lora"])
def test_controller_shows_its_ranks(config: ard.config.AdapterConfig) -> None:
    model = ard.wrap(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), config)
    controller = ard.attach(model, AdamW(model.parameters()), total_steps=10)
    view = controller.show()
    phase, parameters = controller.summary()["phase"], controller.parameters()
    units = [rank for ranks in controller.ranks().values() for rank in ranks]
    mean = sum(units) / len(units)
    assert view.title == f"step 0, {phase}: mean rank {mean:.2f}, {parameters:,} parameters"
    assert view.ranks == controller.ranks()
