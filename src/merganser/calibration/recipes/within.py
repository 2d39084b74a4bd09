"""Make the statistics that a recipe's method measures within the merge, from the data that the recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from ...engine.output.failure import failures_of
from ...engine.plan.plan import Plan
from ...errors import DataError, OutputError, RecipeError
from ...statistics import STATISTICS_NAME, open_statistics
from ..learning import learn_coefficients
from ..output.target import remove_earlier, tidy
from ..single.preparation import Prepared
from ..single.run import Progress
from ..within.merged import merge_identity, merged_reading, merged_sources
from ..within.walk import calibrate_within
from .statistics import check_same, placed, prepared_for
from .wanted import Wanted

__all__ = ["make_within"]


def make_within(
    plan: Plan, wanted: Sequence[Wanted], folder: Path, *, kept: bool, cache_dir: Path | None, progress: Progress | None
) -> list[Path]:
    """Measure the statistics of all models of a merge, unless they are there; an interrupted run continues.

    Args:
        plan: The merge, planned without them.
        wanted: The models in the order of the recipe, each with its data.
        folder: The folder for the folders of all models.
        kept: Whether the folder is the user's: other statistics in it are refused, and replaced otherwise.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished blocks (steps, of coefficients that are learnt) and of all.

    Returns:
        The folder of each model.

    Raises:
        MergeError: They cannot be made.
    """
    sources = merged_sources(plan)
    if len(sources) != len(wanted):
        lacking = next(source for source in sources if source.data is None)
        raise RecipeError(
            f"{lacking.place}: {plan.method.name} measures all models together, within the merge; give data for each"
        )
    names = [PurePosixPath(each.name).name for each in wanted]
    with ExitStack() as stack:
        reading = stack.enter_context(merged_reading(plan))
        models = []
        for each in wanted:
            with placed(each):
                models.append(stack.enter_context(prepared_for(each, cache_dir, reading)))
        tidy(folder)
        if folder.exists():
            try:
                return _present(plan, models, [folder / name for name in names])
            except (DataError, OutputError):
                if kept:
                    raise
            _remove(folder)
        end_to_end = plan.method.data_inputs == "end_to_end"
        measure = learn_coefficients if end_to_end else calibrate_within
        measure(plan, models, folder, progress, names=names)
    return [folder / name for name in names]


def _present(plan: Plan, models: Sequence[Prepared], folders: Sequence[Path]) -> list[Path]:
    """Return the folders, if they hold the statistics that would be made.

    Raises:
        OutputError: They hold others.
    """
    for model, folder in zip(models, folders, strict=True):
        if not (folder / STATISTICS_NAME).exists():
            raise OutputError(
                f"{folder.parent}: holds no statistics of {folder.name}; remove it, or keep these elsewhere"
            )
        present = open_statistics(folder)
        check_same(present, model, folder, hashing=True, merge=merge_identity(plan))
    return list(folders)


def _remove(folder: Path) -> None:
    """Remove statistics of an earlier recipe, or what is left of them, from a folder that is ours.

    Raises:
        OutputError: Something else is there, or cannot be removed.
    """
    with failures_of(folder):
        for own in sorted(folder.iterdir()):
            if (own / STATISTICS_NAME).exists():
                remove_earlier(own)
            own.rmdir()
        folder.rmdir()
