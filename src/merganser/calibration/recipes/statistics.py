"""Plan and make the statistics of one model that a recipe needs from the data that it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ...errors import DataError, MergeError, OutputError
from ...statistics import STATISTICS_NAME, CalibrationPlan, Statistics, open_statistics
from ...statistics.choice import LABELS
from ..output.target import remove_earlier, tidy
from ..planning.plan import lay_out, plan_prepared
from ..single.preparation import STATISTICS, Prepared, Reading, prepare
from ..single.run import Progress, run_prepared
from .wanted import Wanted

__all__ = ["check_same", "make_statistics", "placed", "plan_statistics", "prepared_for"]


def plan_statistics(
    wanted: Wanted,
    folder: Path,
    kept: Path | None,
    cache_dir: Path | None,
    merge: str | None = None,
    reading: Reading | None = None,
) -> CalibrationPlan:
    """Plan a calibration, and lay out its statistics without values, for planning the merge.

    Args:
        wanted: What to make.
        folder: The folder to write, which must not exist.
        kept: Where the statistics will be; None where that is temporary.
        cache_dir: Folder for models from the Hub.
        merge: The hash of the merge within which they are measured; None if there is none, or it is not known yet.
        reading: How models read text within the merge; None for their own way.

    Raises:
        MergeError: The data or the model cannot be used; the message begins with the place in the recipe.
    """
    with placed(wanted), prepared_for(wanted, cache_dir, reading) as prepared:
        plan, blocks = plan_prepared(prepared, wanted.model, wanted.name, wanted.mode)
        lay_out(prepared, blocks, folder, wanted.mode)
        present = kept is not None and (kept / STATISTICS_NAME).exists()
        if present and kept is not None:
            check_same(open_statistics(kept), prepared, kept, merge=merge, hashing=False)
        return replace(plan, present=present)


def make_statistics(
    wanted: Wanted, folder: Path, *, kept: bool, cache_dir: Path | None, progress: Progress | None
) -> Statistics:
    """Calibrate a model, unless the statistics are there; an interrupted calibration continues.

    Args:
        wanted: What to make.
        folder: The folder for them.
        kept: Whether the folder is the user's: other statistics in it are refused, and replaced otherwise.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished blocks and of all blocks.

    Raises:
        MergeError: They cannot be made; the message begins with the place in the recipe.
    """
    with placed(wanted), prepared_for(wanted, cache_dir) as prepared:
        tidy(folder)
        if (folder / STATISTICS_NAME).exists():
            try:
                present = open_statistics(folder)
                check_same(present, prepared, folder, hashing=True)
                return present
            except (DataError, OutputError):
                # others, or what is left of others by a run that was killed while it removed them
                if kept:
                    raise
            remove_earlier(folder)
        return run_prepared(prepared, folder, progress)


@contextmanager
def prepared_for(wanted: Wanted, cache_dir: Path | None, reading: Reading | None = None) -> Iterator[Prepared]:
    """Prepare a calibration; arguments as for `plan_statistics`."""
    data = wanted.data
    with prepare(
        wanted.model,
        data.source,
        statistics=[name for name in wanted.statistics if name in STATISTICS],
        choice=data.choice,
        labels=data.labels or LABELS[0],
        batch_tokens=data.batch_tokens,
        cache_dir=cache_dir,
        reading=reading,
    ) as prepared:
        yield prepared


@contextmanager
def placed(wanted: Wanted) -> Iterator[None]:
    """Let the messages of errors begin with the place in the recipe."""
    try:
        yield
    except MergeError as error:
        raise type(error)(f"{wanted.place}: data: {error}") from None


def check_same(
    present: Statistics, prepared: Prepared, folder: Path, *, hashing: bool, merge: str | None = None
) -> None:
    """Check that statistics are those that would be made.

    Args:
        present: The statistics.
        prepared: What they would be made of.
        folder: Where they are.
        hashing: Whether to hash the model's files; otherwise a few of its weights are compared.
        merge: The hash of the merge within which they would be measured; None to compare none.

    Raises:
        OutputError: They are of another model, of other data, or of another merge.
    """
    about = prepared.about(hashing=hashing)
    model, size = present.about["model"], prepared.batch_tokens
    known = "hash" if hashing else "sample"
    other = {
        # statistics of an earlier version have no sample
        "of other weights": model.get(known, about["model"][known]) != about["model"][known],
        "of another tokenizer": present.about["tokenizer"] != about["tokenizer"],
        "of other data, or other sequences of them": present.about["parts"] != about["parts"],
        "of another loss": prepared.labels is not None and present.about.get("labels") != prepared.labels,
        "of other kinds": not set(prepared.statistics) <= set(present.statistics),
        "of another merge": merge is not None and present.merge != merge,
        "of batches of another size (batch_tokens)": present.about.get("batch_tokens", size) != size,
    }
    found = next((reason for reason, differs in other.items() if differs), None)
    if found is not None:
        raise OutputError(
            f"{folder}: the statistics there are {found} than the recipe's; remove them, or keep these in another folder"
        )
