"""Make a router from files of text, and test it on text that it was not made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...calibration.data.data import Conversation, Pair, Record, read_data
from ...errors import ParameterError, did_you_mean
from ...wording import plural
from .finding import open_tasks
from .model import RoutedModel

__all__ = ["Routing", "Texts", "cut_texts", "make_router", "texts_of_tasks"]

_HELD_OUT = 5
"""Every fifth window is held out."""


@dataclass(frozen=True)
class Routing:
    """A router that was made and saved.

    Args:
        file: The file.
        fitted: Number of windows that the router was made from, by task.
        chosen: For each task, how often each task was chosen for its held-out windows.
        length: Tokens of a window.
    """

    file: Path
    fitted: Mapping[str, int]
    chosen: Mapping[str, Mapping[str, int]]
    length: int

    def right(self, task: str) -> float:
        """Return the share of a task's held-out windows for which it was chosen."""
        return self.chosen[task].get(task, 0) / sum(self.chosen[task].values())


def make_router(
    out: str | Path,
    data: Mapping[str, Sequence[str | Path]],
    *,
    length: int | None = None,
    windows: int = 200,
    ridge: float = 0.1,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Routing:
    """Make a router from texts of each task, choose the task of held-out text with it, and save it beside the tasks.

    Args:
        out: A merge with sidecars, a folder of adapters, or `BASE+FOLDER`.
        data: Files by the name of their task; every task has some.
        length: Tokens of a window; by default 256, or what the model can see if that is less.
        windows: Most windows of a task, spread evenly over its text. Every fifth is held out.
        ridge: Regularisation, relative to the mean square of the hidden states.
        device: Where the model runs.
        progress: Called with the number of held-out windows done so far, and in total.

    Raises:
        NotFoundError: `out`, or its sidecars or adapters, are missing.
        DataError: A file is missing or malformed.
        ParameterError: A task is unknown, or has too little text.
    """
    opened = open_tasks(out)
    given = texts_of_tasks(out, opened.tasks, data)
    model = RoutedModel(opened, device=device, stored_router=False)
    texts = cut_texts(given, model.tokenizer, model.positions, length, windows)
    length, held, fitted = texts.length, texts.held, texts.fitted
    model.fit(fitted, ridge=ridge, length=length)
    chosen, done, total = {}, 0, sum(map(len, held.values()))
    for task, own in held.items():
        counts: Counter[str] = Counter()
        for window in own:
            counts.update(model.choose(torch.tensor([model.tokenizer(window, verbose=False)["input_ids"][:length]])))
            done += 1
            if progress:
                progress(done, total)
        chosen[task] = dict(counts)
    return Routing(model.save_router(), {task: len(own) for task, own in fitted.items()}, chosen, length)


@dataclass(frozen=True)
class Texts:
    """Windows of text of every task.

    Args:
        length: Tokens of a window.
        fitted: By task, the windows from which something is made.
        held: By task, those on which it is tried.
    """

    length: int
    fitted: dict[str, list[str]]
    held: dict[str, list[str]]


def texts_of_tasks(
    out: str | Path, tasks: Sequence[str], data: Mapping[str, Sequence[str | Path]]
) -> dict[str, list[str]]:
    """Read the texts of all tasks.

    Args:
        out: What the tasks belong to, for messages.
        tasks: Their names.
        data: Files by the name of their task.

    Raises:
        DataError: A file is missing or malformed.
        ParameterError: A task is unknown, or has no file.
    """
    for name in data:
        if name not in tasks:
            raise ParameterError(f"{out}: no task {name!r}.{did_you_mean(name, tasks)} Tasks: {', '.join(tasks)}")
    for task in tasks:
        if not data.get(task):
            raise ParameterError(f"the router needs text of every task; {task!r} has none")
    return {task: [_text(record) for file in read_data(data[task]) for record in file.records] for task in tasks}


def cut_texts(
    texts: Mapping[str, Sequence[str]], tokenizer: Any, positions: int | None, length: int | None, windows: int
) -> Texts:
    """Cut the texts of all tasks into windows; every fifth is held out.

    Args:
        texts: Texts by the name of their task.
        tokenizer: The tokenizer of transformers.
        positions: Most tokens that the model can see; None without a limit.
        length: Tokens of a window; by default 256, or what the model can see if that is less.
        windows: Most windows of a task, spread evenly over its text.

    Raises:
        ParameterError: A task has too little text, or a window is longer than what the model can see.
    """
    most = positions or 256
    if length is not None and length > most:
        raise ParameterError(f"length: {length} tokens, and the model can see {most} at once; give at most {most}")
    length = length or min(256, most)
    cut = {task: _windows(tokenizer, own, length, windows) for task, own in texts.items()}
    for task, own in cut.items():
        if len(own) < 2:
            raise ParameterError(
                f"the text of {task!r} gives {plural(len(own), 'window')} of {length} tokens, and one is held out: at "
                "least 2 are needed; give more text, or a smaller length"
            )
    fitted = {task: [window for i, window in enumerate(own) if i % _HELD_OUT != 1] for task, own in cut.items()}
    return Texts(length, fitted, {task: own[1::_HELD_OUT] for task, own in cut.items()})


def _windows(tokenizer: Any, texts: Sequence[str], length: int, most: int) -> list[str]:
    """Cut texts into windows of a number of tokens; a shorter one is kept where the text is shorter."""
    found = []
    for text in texts:
        given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in given["offset_mapping"]][length - 1 :: length]
        starts = [0, *ends]
        whole = [text[start:end] for start, end in zip(starts, ends, strict=False) if end > start]
        found += whole or ([text] if given["input_ids"] else [])
    step = max(1, -(-len(found) // most))
    return found[::step]


def _text(record: Record) -> str:
    if isinstance(record, Pair):
        return record.prompt + record.completion
    if isinstance(record, Conversation):
        return "\n".join(message["content"] for message in record.messages)
    return record.text
