"""Compare rank-allocation methods at equal final parameters: see `command`.

For every method the learning rate is chosen on seeds of its own by the validation loss, with the same tries for all;
then all run on the same report seeds and are compared to one of them seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ardlora_ext.bench.quality.methods import Method, MethodUnavailable
from ardlora_ext.bench.quality.trial import Bed, Row, run_trial
from ardlora_ext.bench.stats import Interval, bootstrap, paired
from ardlora_ext.errors import InputError

TUNE_SEED = 1000  # tuning seeds start here, far from the report seeds 0, 1, ...


@dataclass(frozen=True)
class Effort:
    """How much is run: report seeds, tuning seeds, and the learning rates each method may try."""

    seeds: int
    tune_seeds: int
    lrs: tuple[float, ...]

    def trials(self, methods: int) -> int:
        """Return the number of runs."""
        tuning = len(self.lrs) * self.tune_seeds if len(self.lrs) > 1 else 0
        return methods * (tuning + self.seeds)


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        bed: where it was made.
        reference: label of the method that differences are taken to.
        rows: of every run; `split` tells tuning from report runs.
        chosen: learning rate of each method.
        missing: why a method did not run.
    """

    bed: Bed
    reference: str
    rows: list[Row] = field(default_factory=list)
    chosen: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def reported(self, label: str) -> list[Row]:
        """Return the report rows of a method, by seed."""
        found = [row for row in self.rows if row["method"] == label and row["split"] == "report"]
        return sorted(found, key=lambda row: row["seed"])

    def values(self, label: str, key: str | None = None) -> list[float]:
        """Return what a method measured, by seed."""
        return [row[key or self.bed.measure.key] for row in self.reported(label)]

    def difference(self, label: str) -> Interval | None:
        """Return a method's measure minus the reference's, or None where there is nothing to compare."""
        if label == self.reference or self.reference not in self.chosen:
            return None
        ours, theirs = self.values(label), self.values(self.reference)
        if not all(map(math.isfinite, ours + theirs)):
            return None
        return paired(ours, theirs)

    def verdict(self, label: str) -> str:
        """Return `better`, `worse` or `no difference`; nothing for one seed and for the reference itself."""
        interval = self.difference(label)
        if interval is None or math.isnan(interval.low):
            return ""
        if not interval.excludes_zero:
            return "no difference"
        return "better" if (interval.mean < 0) == (self.bed.measure.better == "lower") else "worse"


Tick = Callable[[Comparison], None]


def compare(
    bed: Bed, methods: Sequence[Method], effort: Effort, reference: str, tick: Tick = lambda _: None
) -> Comparison:
    """Tune and run every method; one that this build lacks is noted in `missing`. `tick` is called after each run.

    Raises:
        InputError: a method does not fit the bed, or none can run.
    """
    found = Comparison(bed, reference)
    for method in methods:
        try:
            _run_method(found, method, effort, tick)
        except MethodUnavailable as reason:
            found.missing[method.label] = str(reason)
    if not found.chosen:
        reasons = "; ".join(f"{label}: {why}" for label, why in found.missing.items())
        raise InputError(f"bench: at least one method must be able to run, got none ({reasons})")
    return found


def _run_method(found: Comparison, method: Method, effort: Effort, tick: Tick) -> None:
    def trial(lr: float, seed: int, split: str) -> Row:
        row = {**run_trial(found.bed, method, lr, seed, tuning=split == "tune"), "split": split}
        found.rows.append(row)
        tick(found)
        return row

    lr = effort.lrs[0]
    if len(effort.lrs) > 1:
        losses = {
            lr: sum(trial(lr, TUNE_SEED + s, "tune")["valid"] for s in range(effort.tune_seeds)) for lr in effort.lrs
        }
        lr = min(losses, key=lambda value: losses[value])
        if not math.isfinite(losses[lr]):
            raise MethodUnavailable("diverged at every learning rate")
    for seed in range(effort.seeds):
        trial(lr, seed, "report")
    found.chosen[method.label] = lr


# --- command line -----------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of what a method measured with its interval, or None where a run diverged."""
    return bootstrap(values) if values and all(map(math.isfinite, values)) else None
