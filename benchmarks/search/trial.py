"""A trial beside writing the merge to disk and loading it: processor time; both models are scored on the same items."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from merganser import merge
from merganser.evaluation.scoring.journal import Journal
from merganser.search.scoring.bench import Bench
from merganser.search.scoring.items import Table

from .field import Field, cpu

_WEIGHTS = (0.3, 0.5, 0.7)


def measure(field: Field, work: Path) -> dict[str, Any]:
    """Measure both ways, in turns, for a recipe of each weight.

    Args:
        field: Models and items.
        work: Folder for the merges that are written.

    Returns:
        The mean seconds of a trial without its scoring, of writing and loading the merge, and of the scoring; and whether all items of
        both models had the same scores, to the last bit.
    """
    splits = field.bench.table.splits
    trials = Bench(Table(Journal(None), splits), field.bench.settings, field.bench.tokenizers, None)
    waves, dtype = trials.table.waves, next(iter(splits.values())).dtype
    # the model that trials overwrite is loaded before the first one
    trials.score(field.base, waves)
    rows = []
    for weight in _WEIGHTS:
        recipe = field.model(field.recipe(weight), f"weight-{weight:g}")
        begin = cpu()
        made = trials.read(recipe)[dtype]
        row = {"weight": weight, "trial": cpu() - begin}
        begin = cpu()
        scores = _scores(trials, made)
        row["scoring"] = cpu() - begin
        with tempfile.TemporaryDirectory(prefix="written-", dir=work) as scratch:
            begin = cpu()
            merge(Path(str(recipe.reference)), Path(scratch, "model"))
            loaded = AutoModelForCausalLM.from_pretrained(Path(scratch, "model"), dtype=getattr(torch, dtype)).eval()
            row["written"] = cpu() - begin
            row["same"] = _scores(trials, loaded) == scores
        rows.append(row)
    return {
        "items": trials.table.count(waves),
        "context": field.bench.settings.context,
        "dtype": dtype,
        "rows": rows,
        **{name: sum(row[name] for row in rows) / len(rows) for name in ("trial", "written", "scoring")},
        "same": all(row["same"] for row in rows),
    }


def _scores(bench: Bench, model: Any) -> dict[str, list[Any]]:
    """Return what is measured of a loaded model, by task and wave."""
    return {
        task: [
            split.prepared.measure_items(model, split.items(wave)) for wave in bench.table.waves if split.items(wave)
        ]
        for task, split in bench.table.splits.items()
    }
