"""A report of a merge, or of a search, on one page.

The report computes nothing: its numbers come from the run record, an evaluation, and (if requested) measured spectra; of a
search from its result and its table of items.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, UnsupportedError, suggest_keywords
from ..evaluation.stored import read_evaluation
from ..files import write_whole
from ..inference.sources import open_source
from ..inspection.spectra import Spectra, measure_spectra
from ..record.format import PAGE_NAME, is_page
from ..record.reading import Record, read_record
from ..search.auto.choice import KIND as CHOICE
from ..search.auto.choice import read_choice
from ..search.stored import is_study, read_items, read_study, result_kind
from .blocks import Section
from .folding import folded
from .page import render
from .sections import sections, summary
from .study import choice_sections, choice_summary, study_sections, study_summary

__all__ = ["PAGE_NAME", "Report", "read_report", "write_report"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a report.

    Args:
        title: Name of the merge.
        lead: What was merged, in one line.
        sections: The sections, in order.
    """

    title: str
    lead: str
    sections: Sequence[Section]


def read_report(
    out: str | Path,
    *,
    evaluation: str | Path | None = None,
    spectra: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Return the report of a merge, or of a search.

    Args:
        out: Folder that a merge or a search wrote.
        evaluation: File that `merganser eval --json` wrote; the merge is found in it by the hash of its contents.
        spectra: Measure singular values of task vectors, which reads weights.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of matrices measured so far and in total.

    Raises:
        NotFoundError: There is no such folder or file, or no run record.
        CheckpointError: The run record, the evaluation or a checkpoint is damaged.
        UnsupportedError: The record or the evaluation has a later format, or there are no task vectors to measure.
    """
    if is_study(Path(out)):
        return _study(Path(out), evaluation, spectra)
    record = read_record(out)
    evaluated = None
    if evaluation is not None:
        with ExitStack() as stack:
            evaluated = read_evaluation(evaluation), open_source(str(record.out), stack).hash
    measured = _spectra(record, cache_dir, progress) if spectra else None
    found = sections(record, evaluated, measured)
    return Report(Path(out).resolve().name, summary(record), [folded(section) for section in found])


@suggest_keywords
def write_report(
    out: str | Path,
    file: str | Path | None = None,
    *,
    evaluation: str | Path | None = None,
    spectra: bool = False,
    overwrite: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a merge, or of a search, as one HTML page, which needs no other file, no server and no network.

    Args:
        out: Folder that a merge or a search wrote.
        file: The page; by default `report.html` in that folder.
        evaluation: As for `read_report`.
        spectra: As for `read_report`.
        overwrite: Replace an existing file.
        cache_dir: As for `read_report`.
        progress: As for `read_report`.

    Returns:
        The page.

    Raises:
        OutputError: The page exists, or cannot be written.
        MergeError: As for `read_report`, and UnsupportedError if plotly is not installed.
    """
    target = Path(out) / PAGE_NAME if file is None else Path(file)
    if not is_study(Path(out)):
        read_record(out)  # raise errors of the merge before errors of the target
    _check(target, overwrite)
    report = read_report(out, evaluation=evaluation, spectra=spectra, cache_dir=cache_dir, progress=progress)
    write_whole(target, render(report.title, report.lead, report.sections))
    return target


def _study(folder: Path, evaluation: str | Path | None, spectra: bool) -> Report:
    for name, given in (("--eval", evaluation is not None), ("--spectra", spectra)):
        if given:
            raise UnsupportedError(f"{folder}: {name} is for the report of a merge, and this is the folder of a search")
    if result_kind(folder) == CHOICE:
        choice = read_choice(folder)
        return Report(folder.resolve().name, choice_summary(choice), choice_sections(choice, read_items(folder)))
    study = read_study(folder)
    return Report(folder.resolve().name, study_summary(study), study_sections(study, read_items(folder)))


def _spectra(record: Record, cache_dir: Path | None, progress: Progress | None) -> Spectra:
    movement = record.movement
    if movement is None or not movement.inputs or not movement.from_base or len(movement.inputs) < 2:
        raise UnsupportedError(
            f"{record.out}: singular values are those of task vectors, and its run record names no base with models "
            "that every tensor was merged from"
        )
    base, *models = movement.inputs
    return measure_spectra(record.out, base, models, cache_dir=cache_dir, progress=progress)


def _check(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name a file, such as {target / PAGE_NAME}")
    # a broken link also belongs to the user
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputError(f"{target}: exists; choose another file with --out, or replace it with --overwrite")
    if not is_page(target):
        raise OutputError(f"{target}: exists and is not a page by merganser; choose another file with --out")
