"""Where a merge makes the statistics that it lacks: a folder beside the output, or one that the recipe names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from ...engine.output.beside import continued_folder_beside
from ...engine.output.ownership import MARKER
from ...engine.plan.plan import Plan
from ...engine.run import Interrupted
from ...recipe import Recipe
from ...recipe.document.place import Place
from ...statistics import CalibrationPlan
from ..learning import check_learning
from ..output.target import LEFT, working_names
from ..within.merged import merge_identity, merged_reading
from .matches import WantedMatch, make_match, matches_wanted_by, plan_match, with_matches
from .statistics import make_statistics, plan_statistics
from .wanted import Wanted, wanted_by, with_statistics
from .within import make_within

__all__ = ["Progress", "StatisticsHome", "statistics_home"]


PlanMerge = Callable[[Recipe], Plan]


class Progress(Protocol):
    """Receives reports of the calibrations of a merge."""

    def calibrating(self, model: str, done: int, blocks: int) -> None:
        """Report how many of a model's blocks are done."""


class StatisticsHome:
    """A folder for the statistics of all recipes of a file, each model's under its name.

    Args:
        folder: The folder.
        cache_dir: Folder for models from the Hub.
        plan_merge: Plans the merge of a recipe without its statistics from data.
    """

    def __init__(self, folder: Path, cache_dir: Path | None, plan_merge: PlanMerge) -> None:
        self.folder = folder
        self._plan_merge = plan_merge
        self._cache_dir = cache_dir
        self._taken: list[str] = []

    def plan(self, recipe: Recipe) -> tuple[Recipe, list[CalibrationPlan]]:
        """Lay out the statistics of a recipe here, and return the recipe with them, and what it takes to make them.

        Raises:
            MergeError: They cannot be made.
        """
        matches = self._wanted_matches(recipe)
        plans = [plan_match(each, self._kept(recipe, each), self._cache_dir) for each in matches]
        recipe = with_matches(recipe, dict.fromkeys(matches))
        wanted = self._wanted(recipe)
        folders = {each: self.folder / each.name for each in wanted}
        with contextlib.ExitStack() as stack:
            merge = reading = None
            if wanted and wanted[0].mode.inputs != "own":
                plan = self._plan_merge(recipe)
                if wanted[0].mode.descent is not None:
                    check_learning(plan)
                # permutations are found later, and belong to the merge
                merge = None if matches else merge_identity(plan)
                reading = stack.enter_context(merged_reading(plan))
            for each in wanted:
                kept = self._kept(recipe, each)
                plans.append(plan_statistics(each, folders[each], kept, self._cache_dir, merge, reading))
        return with_statistics(recipe, folders), plans

    def make(self, recipe: Recipe, progress: Progress | None) -> Recipe:
        """Make the statistics that a recipe lacks, and return the recipe with them.

        Raises:
            MergeError: They cannot be made.
            Interrupted: Ctrl-C was pressed; the same call continues.
        """
        recipe = self._make_matches(recipe, progress)
        folders: dict[Wanted, Path] = {}
        wanted = self._wanted(recipe)
        if wanted and wanted[0].mode.inputs != "own":
            return self._make_within(recipe, wanted, progress)
        for each in wanted:
            kept = self._kept(recipe, each)
            folders[each] = folder = kept or self.folder / each.name
            with _stoppable(each.place, f"{each.name} was"):
                tell = _told(progress, each.name)
                make_statistics(each, folder, kept=kept is not None, cache_dir=self._cache_dir, progress=tell)
        return with_statistics(recipe, folders)

    def _make_matches(self, recipe: Recipe, progress: Progress | None) -> Recipe:
        folders: dict[WantedMatch, Path | None] = {}
        for each in self._wanted_matches(recipe):
            kept = self._kept(recipe, each)
            folders[each] = folder = kept or self.folder / each.name
            with _stoppable(each.align.place, f"{each.name} was"):
                tell = _told(progress, each.name)
                make_match(each, folder, kept=kept is not None, cache_dir=self._cache_dir, progress=tell)
        return with_matches(recipe, folders)

    def _make_within(self, recipe: Recipe, wanted: Sequence[Wanted], progress: Progress | None) -> Recipe:
        group = PurePosixPath(wanted[0].name).parts[0]
        kept = None if recipe.keep_statistics is None else Path(recipe.keep_statistics).expanduser()
        with _stoppable(wanted[0].place, "all models were"):
            found = make_within(
                self._plan_merge(recipe),
                wanted,
                (kept or self.folder) / group,
                kept=kept is not None,
                cache_dir=self._cache_dir,
                progress=_told(progress, "all models"),
            )
        return with_statistics(recipe, dict(zip(wanted, found, strict=True)))

    def _wanted(self, recipe: Recipe) -> list[Wanted]:
        found = wanted_by(recipe, taken=self._taken)
        self._taken += [each.name for each in found]
        return found

    def _wanted_matches(self, recipe: Recipe) -> list[WantedMatch]:
        found = matches_wanted_by(recipe, self._taken)
        self._taken += [each.name for each in found]
        return found

    def _kept(self, recipe: Recipe, wanted: Wanted | WantedMatch) -> Path | None:
        if recipe.keep_statistics is None:
            return None
        return Path(recipe.keep_statistics).expanduser() / wanted.name


def _told(progress: Progress | None, name: str) -> Callable[[int, int], None]:
    """Return what reports the finished blocks of a calibration under this name."""

    def tell(done: int, blocks: int) -> None:
        if progress is not None:
            progress.calibrating(name, done, blocks)

    return tell


@contextlib.contextmanager
def _stoppable(place: Place, what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{place}: stopped while {what} calibrated; run the same command again to continue") from None


@contextlib.contextmanager
def statistics_home(
    out: Path, plans: Sequence[CalibrationPlan], *, fresh: bool, cache_dir: Path | None, plan_merge: PlanMerge
) -> Iterator[StatisticsHome]:
    """Lock the folder for statistics beside a target; remove it at the end, unless the run can be continued.

    Args:
        out: The target.
        plans: All calibrations of the run.
        fresh: Whether to remove what an interrupted run left.
        cache_dir: Folder for models from the Hub.
        plan_merge: Plans the merge of a recipe without its statistics from data.

    Raises:
        OutputError: The folder holds what merganser did not write, cannot be written, or another run uses it.
    """
    names = [name for plan in plans for name in _names(plan)]
    with continued_folder_beside(out, "statistics", names, fresh=fresh) as home:
        yield StatisticsHome(home, cache_dir, plan_merge)


def _names(plan: CalibrationPlan) -> list[str]:
    """Return the names of everything that a calibration writes into the folder around its own."""
    # models that are measured within a merge share the first part
    first = PurePosixPath(plan.name).parts[0]
    folder, lock = working_names(first)
    return [
        f"{folder}/",
        lock,
        *(f"{plan.name}/{file}" for file in plan.files),
        *(f"{first}/{name}" for name in (MARKER, *LEFT)),
    ]
