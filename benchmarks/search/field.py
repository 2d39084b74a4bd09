"""The shipped zoo with a few short windows of each tune text: models, items, and a table that studies share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import Zoo
from merganser.evaluation.run import Wanted
from merganser.evaluation.scoring.tasks import load_tasks
from merganser.recipe.document.parsing import parse_mapping
from merganser.search.folder import Folder, key_of, open_folder
from merganser.search.scoring.bench import Bench, Model, open_bench
from merganser.search.scoring.items import HELD
from merganser.search.scoring.judge import ItemJudge
from merganser.search.scoring.objectives import parse_objectives
from merganser.search.space.space import Space
from merganser.search.study import Study
from merganser.search.trials import Silent, Trial, Trials

HIGHEST = 1.5
"""Upper end of the weight of each expert; task arithmetic adds that much of its task vector."""


def cpu() -> float:
    """Return the processor time of this process, and of those that it waited for, in seconds."""
    return sum(os.times()[:4])


@dataclass
class Field:
    """Models and items.

    Args:
        zoo: The zoo.
        folder: Where recipes and scores are kept.
        bench: Scores models.
        base: The base.
        experts: The experts by domain.
        wanted: How models are scored.
        stored: Whether studies are kept in journals, and continued.
    """

    zoo: Zoo
    folder: Folder
    bench: Bench
    base: Model
    experts: dict[str, Model]
    wanted: Wanted
    stored: bool = True

    def judge(self, *, stopping: bool) -> ItemJudge:
        """Return a judge by the mean share of the experts' gain that is kept; base and experts are scored once."""
        judge = ItemJudge(self.bench, self.base, self.experts, stopping=stopping)
        judge.measure_references()
        assert not judge.notes, judge.notes
        judge.objectives = parse_objectives((), judge.known, judge.default)
        return judge

    def recipe(self, weights: Any, method: str = "task_arithmetic") -> str:
        """Return a recipe of all experts: one value of the weight for all, or one each."""
        each = weights if isinstance(weights, list) else None
        models: list[dict[str, Any]] = [{"model": str(model.reference)} for model in self.experts.values()]
        for i, entry in enumerate(models):
            if each is not None:
                entry["parameters"] = {"weight": each[i]}
        shared = {} if each is not None else {"parameters": {"weight": weights}}
        about = {"merge_method": method, "base_model": str(self.base.reference), "models": models, **shared}
        return parse_mapping(about, "<bench>").text

    def model(self, recipe: str, name: str) -> Model:
        """Return a recipe as a model, with its file written."""
        return Model(key_of(recipe), name, self.folder.write_recipe(name, recipe))

    def space(self) -> Space:
        """Return a weight for each expert."""
        return Space(self.recipe({"search": [0, HIGHEST], "per": "model"}))

    def study(self, name: str, sampler: str, seed: int, trials: int, *, stopping: bool) -> Trials:
        """Carry out a study of a weight for each expert, or continue it.

        Args:
            name: Name of its journal.
            sampler: The sampler.
            seed: Its seed.
            trials: Number of trials.
            stopping: Whether hopeless trials end early.
        """
        space = self.space()
        judge = self.judge(stopping=stopping)
        journal = self.folder.path / f"{name}.log" if self.stored else None
        study = Study(journal, space.dimensions, [judge.objectives[0].direction], sampler, seed, space.start())
        found = Trials(study, space, judge, self.folder)
        found.run(trials, None, Silent())
        return found

    def trials(self) -> list[Trial]:
        """Return the trials of all studies so far that scored everything."""
        found = []
        judge, space = self.judge(stopping=False), self.space()
        for journal in sorted(self.folder.path.glob("*-[0-9]*.log")):
            if journal.stem.endswith("-waves"):
                continue
            study = Study(journal, space.dimensions, ["maximize"], "random", 0, space.start())
            found += Trials(study, space, judge, self.folder).over
        return found

    def held_out(self, one: str, other: str) -> list[float | None] | None:
        """Return how much more one recipe keeps than another on the items held out, and the error; None where none is stored."""
        if not self.stored:
            return None
        if one == other:
            return [0.0, 0.0]
        judge = self.judge(stopping=False)
        kept = [judge.final(self.model(recipe, f"held-{key_of(recipe)[-8:]}"))[0] for recipe in (one, other)]
        difference = kept[0] - kept[1]
        return [difference.value, difference.stderr]

    def count(self, *, held: bool = False) -> int:
        """Return the number of items of trials, or of those held out."""
        return self.bench.table.count([HELD] if held else self.bench.table.waves)


@contextmanager
def open_field(zoo: Zoo, work: Path, windows: int, context: int) -> Iterator[Field]:
    """Open models and items.

    Args:
        zoo: The zoo.
        work: Folder where scores are kept; what is there is not scored again.
        windows: Windows of each tune text for trials; as many are held out.
        context: Tokens of a window.
    """
    tasks = load_tasks({domain: zoo.texts[domain]["tune"] for domain in zoo.experts})
    wanted = Wanted(2 * windows, context, context, None, 4096, torch.device("cpu"))
    work.mkdir(parents=True, exist_ok=True)
    with open_folder(work / f"windows-{windows}x{context}") as folder:
        references = {"base": str(zoo.base)} | {domain: str(path) for domain, path in zoo.experts.items()}
        bench, models = open_bench(references, tasks, wanted, folder.journal, 0, None)
        folder.begin({"command": "benchmarks.search", "windows": windows, "context": context})
        experts = {domain: models[domain] for domain in zoo.experts}
        yield Field(zoo, folder, bench, models["base"], experts, wanted)
