"""A trial beside writing the merge to disk and loading it: processor time, on the same items."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from merganser import merge
from merganser.evaluation.scoring.journal import Journal
from merganser.evaluation.scoring.scorer import Settings
from merganser.search.bench import Bench, Model
from merganser.search.items import Table

from .field import Field, cpu

_WEIGHTS = (0.3, 0.5, 0.7)


def measure(field: Field, work: Path) -> dict[str, Any]:
    """Measure both ways, in turns, for a recipe of each weight.

    Args:
        field: Models and items.
        work: Folder for the merges that are written.
    """
    table = field.bench.table
    settings = field.bench.settings
    waves = table.waves
    # the model that trials overwrite is loaded before the first one
    warm = _bench(field, settings)
    warm.score(field.base, waves)
    rows = []
    for weight in _WEIGHTS:
        recipe = field.model(field.recipe(weight), f"weight-{weight:g}")
        begin = cpu()
        inside = warm.score(recipe, waves)
        trial = cpu() - begin
        scoring = _scoring(warm, recipe)
        with tempfile.TemporaryDirectory(prefix="written-", dir=work) as scratch:
            begin = cpu()
            out = Path(scratch, "model")
            merge(Path(str(recipe.reference)), out)
            cold = _bench(field, settings)
            outside = cold.score(Model(f"written {weight}", "written", str(out)), waves)
            written = cpu() - begin
            shutil.rmtree(out)
        assert cold.loads == len({split.dtype for split in table.splits.values()})
        rows.append({"weight": weight, "trial": trial, "written": written, "scoring": scoring})
        rows[-1]["largest_difference"] = max(abs(inside[name].value - outside[name].value) for name in inside)
    return {
        "items": table.count(waves),
        "context": settings.context,
        "dtype": sorted({split.dtype for split in table.splits.values()}),
        "rows": rows,
        "trial": _mean(rows, "trial"),
        "written": _mean(rows, "written"),
        "scoring": _mean(rows, "scoring"),
    }


def _bench(field: Field, settings: Settings) -> Bench:
    """Return a bench that has scored and loaded nothing."""
    return Bench(Table(Journal(None), field.bench.table.splits), settings, field.bench.tokenizers, None)


def _scoring(bench: Bench, model: Model) -> float:
    """Return what scoring a model that is loaded takes."""
    table, bench.table = bench.table, Table(Journal(None), bench.table.splits)
    begin = cpu()
    bench.score(model, table.waves)
    bench.table = table
    return cpu() - begin


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
