"""Studies of a weight for each of four experts: waves of items on and off, and CMA-ES beside random trials."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from merganser.evaluation.scoring.estimate import Estimate
from merganser.search.trials import Trials

from .field import Field, cpu
from .fitted import FittedBench


def waves(field: Field, sampler: str, seeds: int, trials: int) -> dict[str, Any]:
    """Carry out the same studies with and without waves, and compare their winners and the items that they scored."""
    rows = []
    for seed in range(seeds):
        off = field.study(f"{sampler}-{seed}", sampler, seed, trials, stopping=False)
        on = field.study(f"{sampler}-{seed}-waves", sampler, seed, trials, stopping=True)
        tuned = _difference(field, on, off)
        rows.append(
            {
                "seed": seed,
                "items_off": _items(off),
                "items_on": _items(on),
                "ended_early": sum(trial.stopped for trial in on.over),
                "same_recipe": _winner(on) == _winner(off),
                "winner_off": _best(off),
                "winner_on": _best(on),
                "difference": [tuned.value, tuned.stderr],
                "difference_held_out": field.held_out(_winner(on), _winner(off)),
            }
        )
        _say(f"waves {sampler} seed {seed}: {rows[-1]}")
    share = sum(row["items_on"] for row in rows) / sum(row["items_off"] for row in rows)
    return {"sampler": sampler, "trials": trials, "items": field.count(), "share": share, "rows": rows}


def cma(field: Field, seeds: int, trials: int) -> dict[str, Any]:
    """Carry out studies by CMA-ES and of random points, and compare the best of each."""
    rows = []
    for seed in range(seeds):
        begin = cpu()
        found = {name: field.study(f"{name}-{seed}", name, seed, trials, stopping=False) for name in ("cma", "random")}
        rows.append(
            {
                "seed": seed,
                **{name: _best(own) for name, own in found.items()},
                **{f"{name}_curve": _curve(own) for name, own in found.items()},
                "difference_held_out": field.held_out(_winner(found["cma"]), _winner(found["random"])),
                "cpu": cpu() - begin,
            }
        )
        _say(f"seed {seed}: cma {rows[-1]['cma']:.4f}, random {rows[-1]['random']:.4f}, {rows[-1]['cpu']:.0f} CPU s")
    return {
        "trials": trials,
        "items": field.count(),
        "above": sum(row["cma"] > row["random"] for row in rows),
        "rows": rows,
    }


def replay(field: Field, samplers: Sequence[str], seeds: int, trials: int) -> dict[str, Any]:
    """Carry out the same studies on scores that are fitted to the trials so far, which takes no models."""
    bench = FittedBench(field)
    fitted = replace(field, bench=bench, stored=False)
    return {
        "points": bench.points,
        "error": bench.error,
        "cma": cma(fitted, seeds, trials),
        "waves": [waves(fitted, sampler, seeds, trials) for sampler in samplers],
    }


def _winner(found: Trials) -> str:
    assert found.best is not None
    return found.best.recipe


def _best(found: Trials) -> float:
    assert found.best is not None
    assert found.best.values is not None
    return found.best.values[0]


def _curve(found: Trials) -> list[float]:
    """Return the best value so far after each trial."""
    curve: list[float] = []
    for trial in found.over:
        value = trial.values[0] if trial.values else float("-inf")
        curve.append(round(max([value, *curve[-1:]]), 5))
    return curve


def _items(found: Trials) -> int:
    """Return how many items were scored in trials; a recipe that was tried before is not scored again."""
    return sum(trial.items for trial in found.over if trial.same_as is None)


def _difference(field: Field, one: Trials, other: Trials) -> Estimate:
    judge = field.judge(stopping=False)
    found = [
        judge.objectives[0].value(judge.figures(field.model(_winner(each), "winner"), field.bench.table.waves))
        for each in (one, other)
    ]
    return found[0] - found[1]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
