"""Studies of a weight for each of four experts: waves of items on and off, and CMA-ES beside random trials."""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merganser.evaluation.scoring.estimate import Estimate
from merganser.search.study import Study
from merganser.search.trials import Trials

from .field import Field, cpu


def waves(field: Field, sampler: str, seeds: int, trials: int) -> dict[str, Any]:
    """Carry out the same studies with and without waves, and compare their winners and the items that they scored."""
    rows = []
    for seed in range(seeds):
        off = field.study(f"{sampler}-{seed}", sampler, seed, trials, stopping=False)
        on = field.study(f"{sampler}-{seed}-waves", sampler, seed, trials, stopping=True)
        tuned, held = _difference(field, on, off), field.held(_winner(on)) - field.held(_winner(off))
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
                "difference_held_out": [held.value, held.stderr],
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
        held = field.held(_winner(found["cma"])) - field.held(_winner(found["random"]))
        rows.append(
            {
                "seed": seed,
                **{name: _best(own) for name, own in found.items()},
                **{f"{name}_curve": _curve(own) for name, own in found.items()},
                "difference_held_out": [held.value, held.stderr],
                "cpu": cpu() - begin,
            }
        )
        _say(f"seed {seed}: cma {rows[-1]['cma']:.4f}, random {rows[-1]['random']:.4f}, {rows[-1]['cpu']:.0f} CPU s")
    return {
        "trials": trials,
        "items": field.count(),
        "above": sum(row["cma"] > row["random"] for row in rows),
        "above_held_out": sum(row["difference_held_out"][0] > 0 for row in rows),
        "rows": rows,
    }


def replay(field: Field, seeds: int, trials: int) -> dict[str, Any]:
    """Carry out the same studies on a quadratic fitted to all trials that were scored so far, which costs next to nothing."""
    space = field.space()
    names = [dimension.name for dimension in space.dimensions]
    measured = [trial for trial in field.trials() if trial.whole and trial.same_as is None]
    if len(measured) <= len(_terms(np.zeros((1, len(names))))[0]):
        raise SystemExit(
            f"bench: {len(measured)} trials are too few for a quadratic; measure waves or cma first, with --keep"
        )
    points = np.array([[trial.settings[name] for name in names] for trial in measured])
    values = np.array([trial.values[0] for trial in measured if trial.values])
    factors, *_ = np.linalg.lstsq(_terms(points), values, rcond=None)
    best: dict[str, list[float]] = {"cma": [], "random": []}
    for name, found in best.items():
        for seed in range(seeds):
            study = Study(None, space.dimensions, ["maximize"], name, seed, space.start())
            for _ in range(trials):
                asked = study.ask()
                assert asked is not None
                point = np.array([[asked.point[name] for name in names]])
                study.tell(asked, [float(_terms(point)[0] @ factors)], {}, {})
            found.append(max(told.values[0] for told in study.told if told.values))
    above = sum(a > b for a, b in zip(best["cma"], best["random"], strict=True))
    error = float(np.std(values - _terms(points) @ factors) * (len(values) / (len(values) - len(factors))) ** 0.5)
    return {"seeds": seeds, "trials": trials, "above": above, "points": len(values), "error": error, "best": best}


def _terms(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return one, the coordinates and their products."""
    count, size = points.shape
    pairs = [points[:, i] * points[:, j] for i in range(size) for j in range(i, size)]
    return np.stack([np.ones(count), *points.T, *pairs], 1)


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
