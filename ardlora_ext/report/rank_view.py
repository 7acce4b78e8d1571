"""The ranks of a model to look at while it trains: a table in a terminal, the report's heat map in a notebook."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from statistics import fmean

from ardlora_ext.report.places import Ranks, kind_labels, layer_names


@dataclass(frozen=True)
class RankView:
    """What `controller.show()` returns; Jupyter draws it by `_repr_html_`, everything else prints it.

    Attributes:
        title: a line above.
        ranks: of each unit by module.
    """

    title: str
    ranks: Ranks

    def __repr__(self) -> str:
        """Return the mean rank of each kind of matrix in each layer, as a table."""
        kinds, layers = kind_labels(self.ranks), layer_names(self.ranks)
        columns, rows = list(dict.fromkeys(kinds.values())), list(dict.fromkeys(layers.values()))
        units: dict[tuple[str, str], list[int]] = {}
        for module, found in self.ranks.items():
            for place in ((layers[module], kinds[module]), (layers[module], "mean")):
                units.setdefault(place, []).extend(found)
        heads = [*columns, "mean"]
        lines = [["layer", *heads]]
        for row in rows:
            lines.append([row, *(f"{fmean(units[row, head]):.1f}" if (row, head) in units else "" for head in heads)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, *table])

    def _repr_html_(self) -> str:
        """Return the heat map, or the table where matplotlib (the `train` extra) is not installed."""
        try:
            from ardlora_ext.report.plots import rank_heatmap
        except ImportError:
            return f"<pre>{html.escape(repr(self))}</pre>"
        picture = base64.b64encode(rank_heatmap(self.ranks)).decode("ascii")
        title = html.escape(self.title)
        return f'<p>{title}</p><img src="data:image/png;base64,{picture}" alt="{title}" style="max-width: 100%">'
