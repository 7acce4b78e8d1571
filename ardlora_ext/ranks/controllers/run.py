"""What a run leaves behind for its report: ranks over time, sizes, what it was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

from torch import nn

from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import method_of
from ardlora_ext.model.parameters import parameters_report
from ardlora_ext.report.run_files import peak_rss_mb, versions

Json = dict[str, Any]
_MOST = 400  # entries, so that a checkpoint does not grow with the length of the run


@dataclass(frozen=True)
class RankHistory:
    """Ranks and live parameters of a run at the steps where they changed: at most 400, the last one always.

    Attributes:
        entries: of each: step, live adapter parameters, rank of every unit in the model's order.
        peak: largest number of live adapter parameters.
    """

    entries: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    peak: int = 0

    def add(self, step: int, parameters: int, ranks: Sequence[int]) -> RankHistory:
        """Return the history with this entry, if it tells anything new; where there are too many, every other goes."""
        entry = step, parameters, tuple(ranks)
        if self.entries and self.entries[-1][1:] == entry[1:]:
            return self
        kept = self.entries if len(self.entries) < _MOST else self.entries[::2]
        return RankHistory((*kept, entry), max(self.peak, parameters))

    def to_json(self) -> Json:
        """Return it as numbers and lists."""
        return {"entries": [[step, count, list(ranks)] for step, count, ranks in self.entries], "peak": self.peak}

    @classmethod
    def from_json(cls, state: Mapping[str, Any], units: int) -> RankHistory:
        """Return what `to_json` wrote.

        Raises:
            ValueError: it is not of a model with so many units.
        """
        entries = tuple((int(step), int(count), tuple(map(int, ranks))) for step, count, ranks in state["entries"])
        steps = [step for step, _, _ in entries]
        if any(len(ranks) != units for _, _, ranks in entries) or any(a > b for a, b in pairwise(steps)):
            raise ValueError(f"state: history must have {units} ranks in each entry, and steps in order")
        return cls(entries, int(state["peak"]))


class Run(Protocol):
    """What is asked of a controller."""

    step: int

    @property
    def config(self) -> AdapterConfig: ...
    def summary(self) -> Json: ...
    def ranks(self) -> dict[str, list[int]]: ...
    def rank_history(self) -> list[Json]: ...


def run_metrics(run: Run, model: nn.Module, peak: int) -> Json:
    """Return the content of metrics.json as far as adapters and ranks tell it.

    Args:
        run: the controller.
        model: the wrapped one.
        peak: largest number of live adapter parameters.
    """
    summary, sizes = run.summary(), parameters_report(model)
    budget = summary.get("budget")
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__
    return {
        "method": method_of(run.config),
        "model": str(name).replace("\\", "/").rstrip("/").rpartition("/")[2],
        "seed": run.config.seed,
        "config": asdict(run.config),
        "controller": summary,
        "steps": run.step,
        "params_live": sizes.live,
        "params_peak": max(peak, sizes.live),
        "params_exported": sizes.exported,
        "params_compact": sizes.compact,
        "served_rank": sizes.served_rank,
        "params_budget": None if budget is None else round(budget),
        "params_trainable": sizes.trainable,
        "params_total": sizes.total,
        "peak_rss_mb": peak_rss_mb(),
        "versions": versions(),
        "ranks": run.ranks(),
        "rank_history": run.rank_history(),
    }
