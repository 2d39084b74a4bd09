"""Scores without models: for each item a quadratic of the weights, fitted to what it scored in trials so far."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from merganser.evaluation.scoring.estimate import Estimate
from merganser.evaluation.scoring.journal import Journal
from merganser.search.scoring.bench import Bench, Model
from merganser.search.scoring.items import Split, Table

from .field import Field


class FittedBench(Bench):
    """Gives recipes of trials the fitted scores, and base and experts those that they have.

    Args:
        field: Where trials were scored.
    """

    def __init__(self, field: Field) -> None:
        table = field.bench.table
        splits = {task: _in_waves(split) for task, split in table.splits.items()}
        super().__init__(Table(Journal(None), splits), field.bench.settings, field.bench.tokenizers, None)
        self._known = table
        names = [dimension.name for dimension in field.space().dimensions]
        measured = [trial for trial in field.trials() if trial.whole and trial.same_as is None]
        self.points = len(measured)
        terms = _terms(np.array([[trial.settings[name] for name in names] for trial in measured]))
        if len(terms) <= terms.shape[1]:
            raise SystemExit(f"bench: {len(terms)} trials are too few for a quadratic; measure cma first, with --keep")
        self._factors: dict[str, NDArray[np.float64]] = {}
        self._like: dict[str, dict[str, NDArray[np.float64]]] = {}
        for task in splits:
            columns = [table.columns(trial.model.key, task, table.waves) for trial in measured]
            self._factors[task] = np.linalg.lstsq(terms, np.array([own["bits"] for own in columns]), rcond=None)[0]
            self._like[task] = columns[0]
        judge = replace(field, bench=self).judge(stopping=False)
        fitted = [
            judge.objectives[0].value(judge.figures(field.model(t.recipe, t.name), self.table.waves)) for t in measured
        ]
        misses = [own.value - trial.values[0] for own, trial in zip(fitted, measured, strict=True) if trial.values]
        self.error = float(np.sqrt(np.sum(np.square(misses)) / (len(terms) - terms.shape[1])))

    def score(self, model: Model, waves: Sequence[int]) -> dict[str, Estimate]:
        """Return the figures of a model over some waves."""
        for task, split in self.table.splits.items():
            if all(self.table.journal.get(f"{model.key}/{task}", wave) is not None for wave in waves):
                continue
            if model.key.startswith("recipe "):
                recipe = yaml.safe_load(Path(str(model.reference)).read_text(encoding="utf-8"))
                point = np.array([[each["parameters"]["weight"] for each in recipe["models"]]])
                # bytes are those of every model; what else is measured of a text does not count here
                columns = {**self._like[task], "bits": (_terms(point) @ self._factors[task])[0]}
            else:
                columns = self._known.columns(model.key, task, self._known.waves)
            for wave, (start, end) in enumerate(pairwise(accumulate(map(len, split.waves), initial=0))):
                part = {name: column[start:end].tolist() for name, column in columns.items()}
                self.table.add(model.key, task, wave, part, model.name)
        return self.table.figures(model.key, waves)


def _in_waves(split: Split) -> Split:
    """Return the items of trials in three waves, also where they are too few for a search to do so."""
    items = [item for wave in split.waves for item in wave]
    first = -(-len(items) // 4)
    return replace(split, waves=(tuple(items[:first]), tuple(items[first : 2 * first]), tuple(items[2 * first :])))


def _terms(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return one, the coordinates and their products."""
    count, size = points.shape
    pairs = [points[:, i] * points[:, j] for i in range(size) for j in range(i, size)]
    return np.stack([np.ones(count), *points.T, *pairs], 1)
