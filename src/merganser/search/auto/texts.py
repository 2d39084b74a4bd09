"""Texts of the experts' fields: what methods with data are calibrated on, and, without tasks, also what merges are scored on."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import TaskError, did_you_mean
from ...evaluation.scoring.tasks import TextTask, load_tasks
from ...files import write_whole
from ...inference.sources import split_name
from ...jsonfile import exists

__all__ = ["halve", "read_texts"]

_DIVIDED = (".txt", ".jsonl")


def read_texts(given: Sequence[str | Path] | Mapping[str, str | Path], experts: Sequence[str]) -> dict[str, Path]:
    """Find the text of each expert.

    Args:
        given: Files as `NAME=FILE`, or a mapping from names; without a name, the file name up to the first dot is taken.
        experts: Names of the experts.

    Returns:
        Absolute paths by name of the expert, in the order of the experts.

    Raises:
        TaskError: A name is none of an expert, an expert has no file or two, or a file does not exist.
    """
    pairs = [*given.items()] if isinstance(given, Mapping) else [split_name(str(each)) for each in given]
    found: dict[str, Path] = {}
    for name, file in pairs:
        path = Path(file).expanduser()
        own = name or path.name.partition(".")[0]
        if own not in experts:
            raise TaskError(
                f"data: {own!r} is not an expert.{did_you_mean(own, experts)} Give NAME=FILE with the names of the "
                f"experts: {', '.join(experts)}"
            )
        if own in found:
            raise TaskError(f"data: two files for {own}: {found[own]} and {path}; give one")
        if not exists(path) or path.is_dir():
            raise TaskError(f"data: {file}: there is no such file")
        found[own] = path.absolute()
    missing = [name for name in experts if name not in found]
    if missing:
        raise TaskError(f"data: no text of {', '.join(missing)}; methods with data need one of every expert: NAME=FILE")
    return {name: found[name] for name in experts}


def halve(texts: Mapping[str, Path], folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Divide each text: the first half to calibrate on, the second one as a task.

    A plain text is cut at the end of a line, JSONL between two documents.

    Args:
        texts: The texts by name of the expert.
        folder: Folder for the halves; it is made.

    Returns:
        The first halves and the second ones, by name of the expert.

    Raises:
        TaskError: A file is not of text that can be scored, or holds too little.
    """
    firsts: dict[str, Path] = {}
    seconds: dict[str, Path] = {}
    for name, path in texts.items():
        if path.suffix not in _DIVIDED:
            raise TaskError(
                f"{path}: only {' and '.join(_DIVIDED)} are divided into a half to calibrate on and a half to score; give "
                "tasks of your own: --tasks NAME=FILE..."
            )
        (task,) = load_tasks({name: path})
        if not isinstance(task, TextTask):
            raise TaskError(
                f"{path}: holds questions; as data give texts, and the questions as tasks: --tasks NAME=FILE..."
            )
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        first, second = _cut(lines) if path.suffix == ".txt" else _cut_documents(lines)
        if not first.strip() or not second.strip():
            raise TaskError(f"{path}: is one line, and cannot be divided; give more text, or tasks of your own")
        firsts[name], seconds[name] = folder / f"calibrate-{name}{path.suffix}", folder / f"{name}{path.suffix}"
        folder.mkdir(exist_ok=True)
        for target, text in ((firsts[name], first), (seconds[name], second)):
            write_whole(target, text)
    return firsts, seconds


def _cut(lines: Sequence[str]) -> tuple[str, str]:
    ends = list(itertools.accumulate(len(line) + 1 for line in lines))
    # the line that holds the middle is the last of the first half
    cut = min(bisect.bisect_left(ends, ends[-1] / 2) + 1, len(lines) - 1)
    return "".join(f"{line}\n" for line in lines[:cut]), "\n".join(lines[cut:])


def _cut_documents(lines: Sequence[str]) -> tuple[str, str]:
    documents = [f"{line}\n" for line in lines if line.strip()]
    half = len(documents) // 2
    return "".join(documents[:half]), "".join(documents[half:])
