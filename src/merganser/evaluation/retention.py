"""How much of its experts a merge kept, and how much of its base it forgot.

    recovered = (base - model) / (base - expert)    for each domain, in the task's metric, negated if higher is better
    forgotten = model - base                        on tasks without an expert; positive is worse
    against the best single model = mean recovered of the model - largest mean recovered among base and experts

A domain counts if its expert beats the base by two standard errors; otherwise `recovered` would be a division by noise.
Standard errors come from the delta method over paired items (see `Estimate`). The best single model is chosen on the
same items, which slightly favours it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..wording import digits_text
from .scoring.estimate import Estimate, mean, smallest

SURE = 2.0
"""Number of standard errors by which an expert must beat its base."""

Figures = Mapping[str, Mapping[str, Estimate]]
"""Values of the main metric by model and task, without failed models."""


@dataclass(frozen=True)
class Domain:
    """A task that has an expert.

    Args:
        expert: Name of the model.
        metric: Name of the metric.
        gain: Base minus expert, in the metric with lower as better; None if one of them has no result.
        reason: Why the domain does not count; None if it does.
    """

    expert: str
    metric: str
    gain: Estimate | None
    reason: str | None


@dataclass(frozen=True)
class Retained:
    """What a model recovered and forgot.

    Args:
        recovered: By domain; None if the domain does not count or the model has no result.
        forgotten: By task without an expert: the loss, and the loss as a share of the base's value.
        mean: Mean of `recovered` over the domains that count; None if the model lacks one of them, or none counts.
    """

    recovered: Mapping[str, Estimate | None]
    forgotten: Mapping[str, tuple[Estimate, Estimate | None]]
    mean: Estimate | None


@dataclass(frozen=True)
class Best:
    """The best of several models.

    Args:
        name: Its name.
        second: Name of the second best.
        ahead: Difference of the two, paired item by item.
        sure: Whether the difference is above two standard errors.
    """

    name: str
    second: str
    ahead: Estimate
    sure: bool


@dataclass(frozen=True)
class Retention:
    """What all models recovered and forgot.

    Args:
        domains: Domains by task name.
        retained: Names of the tasks without an expert.
        models: Models by name, except the base.
        best_single: The base or expert with the largest mean recovered, and that mean; None if no domain counts.
    """

    domains: Mapping[str, Domain]
    retained: tuple[str, ...]
    models: Mapping[str, Retained]
    best_single: tuple[str, Estimate] | None = field(default=None)

    def against_best_single(self, model: str) -> Estimate | None:
        """Return the mean recovered of a model minus that of the best single model; None if either is undefined."""
        average = self.models[model].mean
        return None if average is None or self.best_single is None else average - self.best_single[1]

    def best(self, names: Collection[str]) -> Best | None:
        """Return the model with the largest mean recovered among some, and whether it is surely ahead of the second.

        Args:
            names: Names of models, such as those of the merges.

        Returns:
            None if fewer than two of them have a mean.
        """
        means = [(name, found.mean) for name, found in self.models.items() if name in names]
        ranked = sorted(((n, m) for n, m in means if m is not None), key=lambda pair: -pair[1].value)
        if len(ranked) < 2:
            return None
        (name, first), (second, other) = ranked[:2]
        ahead = first - other
        return Best(name, second, ahead, ahead.stderr is not None and ahead.value > SURE * ahead.stderr)

    def to_json(self) -> dict[str, Any]:
        """Return the retention as written to the JSON of an evaluation."""
        best = self.best_single
        return {
            "domains": {
                name: {
                    "expert": domain.expert,
                    "metric": domain.metric,
                    "gain": _json(domain.gain),
                    "counted": domain.reason is None,
                    "reason": domain.reason,
                }
                for name, domain in self.domains.items()
            },
            "retained": list(self.retained),
            "best_single": None if best is None else {"model": best[0], "recovered": best[1].to_json()},
            "models": {name: self._model_json(name, model) for name, model in self.models.items()},
        }

    def _model_json(self, name: str, model: Retained) -> dict[str, Any]:
        known = {domain: share for domain, share in model.recovered.items() if share is not None}
        worst = (
            dict(zip(("domain", "value", "stderr"), smallest(known), strict=True)) if model.mean is not None else None
        )
        shares = [relative for _, relative in model.forgotten.values() if relative is not None]
        return {
            "recovered": {domain: _json(share) for domain, share in model.recovered.items()},
            "mean": None if model.mean is None else {**model.mean.to_json(), "domains": len(known)},
            "worst": worst,
            "forgotten": {
                task: {
                    **loss.to_json(),
                    "relative": None if share is None else share.value,
                    "relative_stderr": None if share is None else share.stderr,
                }
                for task, (loss, share) in model.forgotten.items()
            },
            "mean_forgotten": {**mean(shares).to_json(), "tasks": len(shares)} if shares else None,
            "against_best_single": _json(self.against_best_single(name)),
        }


def _json(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate.to_json()


def measure_retention(
    figures: Figures, base: str, experts: Mapping[str, str], metrics: Mapping[str, str], higher: Mapping[str, bool]
) -> Retention:
    """Compute what models recovered and forgot.

    Args:
        figures: Values of the main metric by model and task.
        base: Name of the base.
        experts: Name of the expert for each domain.
        metrics: Name of the main metric of each task.
        higher: Whether higher is better, for each task.
    """
    # negate metrics for which higher is better: from here on lower is better
    turned = {
        model: {task: figure * (-1.0 if higher[task] else 1.0) for task, figure in own.items()}
        for model, own in figures.items()
    }
    origin = turned.get(base, {})
    domains = {
        task: _domain(task, expert, metrics[task], origin.get(task), turned.get(expert, {}).get(task))
        for task, expert in experts.items()
    }
    retained = tuple(task for task in metrics if task not in experts)
    gains = {task: domain.gain for task, domain in domains.items() if domain.reason is None and domain.gain is not None}
    models = {name: _retained(own, origin, gains, domains, retained) for name, own in turned.items() if name != base}
    return Retention(domains, retained, models, _best_single(base, experts, models, gains))


def _domain(task: str, expert: str, metric: str, base: Estimate | None, own: Estimate | None) -> Domain:
    if base is None or own is None:
        return Domain(expert, metric, None, f"{'the base' if base is None else expert} has no figure for {task}")
    gain = base - own
    error = gain.stderr
    if error is None:
        return Domain(expert, metric, gain, f"{task} has one item, which gives no standard error")
    if gain.value <= SURE * error or gain.value <= 0:
        reason = f"{expert} does not beat the base by two standard errors: {digits_text(gain.value, 3)} ± {digits_text(error)} {metric}"
        return Domain(expert, metric, gain, reason)
    return Domain(expert, metric, gain, None)


def _retained(
    own: Mapping[str, Estimate],
    base: Mapping[str, Estimate],
    gains: Mapping[str, Estimate],
    domains: Mapping[str, Domain],
    retained: tuple[str, ...],
) -> Retained:
    recovered = {
        task: (base[task] - own[task]) / gains[task] if task in gains and task in own else None for task in domains
    }
    counted = [recovered[task] for task in gains]
    known = [share for share in counted if share is not None]
    forgotten = {}
    for task in retained:
        if task in own and task in base:
            loss = own[task] - base[task]
            origin = base[task] * (1.0 if base[task].value > 0 else -1.0)
            forgotten[task] = (loss, loss / origin if origin.value else None)
    return Retained(recovered, forgotten, mean(known) if known and len(known) == len(counted) else None)


def _best_single(
    base: str, experts: Mapping[str, str], models: Mapping[str, Retained], gains: Mapping[str, Estimate]
) -> tuple[str, Estimate] | None:
    if not gains:
        return None
    singles = {name: found.mean for name in experts.values() if (found := models.get(name)) and found.mean is not None}
    # the base recovers 0 by definition
    return max([(base, Estimate(0.0)), *singles.items()], key=lambda pair: pair[1].value)
