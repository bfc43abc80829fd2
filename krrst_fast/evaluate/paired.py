"""Accuracies by seed: means, deviations, paired differences, and how they are written."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
_T975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16)
_T975_MORE = 2.145


@dataclass(frozen=True)
class Sample:
    """Accuracies, or paired differences of accuracies, in points by seed; at least one."""

    by_seed: Mapping[int, float]
    sets: Mapping[int, Any] = field(default_factory=dict)
    """Which distilled sets a seed took, where there are several: seeds that took the same share
    their luck, and are not independent."""

    @property
    def count(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for a single seed."""
        return statistics.stdev(self.by_seed.values()) if self.count > 1 else None

    @property
    def independent(self) -> int:
        """Number of independent values: the sets where seeds share some, else the seeds."""
        sets = len({self.sets.get(seed) for seed in self.by_seed})
        return sets if 1 < sets < self.count else self.count

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; None for a single seed.

        Where seeds share sets it is that of clusters: the sums of the deviations of each set's
        seeds take the place of the deviations, with k / (k - 1) for k sets.
        """
        if self.std is None or self.independent == self.count:
            return None if self.std is None else self.std / math.sqrt(self.count)
        sums: dict[Any, float] = {}
        for seed, value in self.by_seed.items():
            group = self.sets.get(seed)
            sums[group] = sums.get(group, 0.0) + value - self.mean
        k = len(sums)
        return math.sqrt(k / (k - 1) * sum(x * x for x in sums.values())) / self.count

    @property
    def interval(self) -> float | None:
        """Half of the 95 % interval of the mean by Student's t; None for a single seed."""
        error = self.standard_error
        return None if error is None else error * interval_factor(self.independent)


@dataclass(frozen=True)
class Summary(Sample):
    """One method on one task: its accuracies, and the differences to the baseline."""

    difference: Sample | None = None
    """None for the baseline itself, and where the baseline was not run with a seed of these."""


def interval_factor(seeds: int) -> float:
    """Return the standard errors in half of a 95 % interval of the mean over `seeds` values."""
    return _T975[seeds - 2] if seeds - 2 < len(_T975) else _T975_MORE


def paired_difference(
    ours: Mapping[int, float],
    theirs: Mapping[int, float],
    sets: Mapping[int, Any] | None = None,
) -> Sample | None:
    """Return ours - theirs for the seeds that both have; None where they share no seed.

    `sets` says which distilled sets each seed took, as in `Sample`.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    return Sample({seed: ours[seed] - theirs[seed] for seed in seeds}, sets or {})


def plus_minus(mean: float, spread: float | None) -> str:
    """Return "84.4 +- 2.9", or the mean alone."""
    return f"{mean:.1f}" + ("" if spread is None else f" +- {spread:.1f}")


def signed(mean: float, error: float | None = None) -> str:
    """Return "+3.0 +- 0.8" or "-0.2"; what rounds to zero is "+0.0"."""
    return ("-" if round(mean, 1) < 0 else "+") + plus_minus(abs(mean), error)


def in_words(difference: Sample) -> str:
    """Return "+3.0 +- 0.8 points (5 paired seeds, 95 % interval +0.8 to +5.2)"."""
    seeds = f"{difference.count} paired seed{'s' if difference.count > 1 else ''}"
    if difference.independent < difference.count:
        seeds += f" of {difference.independent} sets"
    if difference.interval is not None:
        seeds += f", 95 % interval {ends(difference)}"
    return f"{signed(difference.mean, difference.standard_error)} points ({seeds})"


def ends(difference: Sample) -> str:
    """Return the ends of the 95 % interval of the mean, "+0.8 to +5.2"."""
    half = difference.interval or 0.0
    return f"{signed(difference.mean - half)} to {signed(difference.mean + half)}"
