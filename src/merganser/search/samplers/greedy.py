"""One free value after another: what is better is kept, as in the selective merging of Model-GLUE.

Source: Zhao et al., Model-GLUE, NeurIPS 2024 (datasets and benchmarks); there the values are the weights of models, in the order of the recipe,
on the grid 0.1 to 0.9. The published code writes the model with the weight that was tried last; here the best is kept. Its
clusters of models by similarity are not part of this: name the models that belong together in the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..space.dimension import Dimension
from .own import Past

_GRID = tuple(i / 10 for i in range(1, 10))
_STEPS = tuple(i / 10 for i in range(-4, 5) if i)


def propose_greedy(
    dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int
) -> Sequence[float]:
    """Return the next place: as `Propose`.

    The first sweep tries nine places of each dimension in turn, or every choice; later sweeps eight around the best, at half
    the distance of the sweep before.
    """
    best = past[0].at if 0 in past else (0.5,) * len(dimensions)
    score = past[0].value if 0 in past else None
    first, sweep = 1, 0
    while True:
        for axis, dimension in enumerate(dimensions):
            block = _candidates(dimension, best[axis], sweep)
            tried = range(first, first + len(block))
            if number in tried:
                return (*best[:axis], block[number - first], *best[axis + 1 :])
            for trial in (past[n] for n in tried if n in past):
                if trial.value is not None and (score is None or trial.value > score):
                    best, score = trial.at, trial.value
            first += len(block)
        sweep += 1


def _candidates(dimension: Dimension, at: float, sweep: int) -> list[float]:
    if dimension.choices is not None:
        return [(i + 0.5) / len(dimension.choices) for i in range(len(dimension.choices))]
    if sweep == 0:
        return [*_GRID]
    return [min(max(at + step / 2**sweep, 0.0), 1.0) for step in _STEPS]
