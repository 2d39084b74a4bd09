"""The tasks of an evaluation: texts, multiple-choice questions, and tasks of lm-eval."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...errors import TaskError, did_you_mean
from ...jsonfile import exists, os_reason, read_file
from ...wording import brief

SUFFIXES = {".txt": "a text", ".jsonl": "questions or documents", ".yaml": "a task of lm-eval", ".yml": "the same"}
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_MAX_BYTES = 2_000_000_000
_QUESTION_KEYS = ("context", "choices", "gold")


@dataclass(frozen=True)
class TextTask:
    """Texts to predict, token by token.

    Args:
        name: Name in tables and results.
        source: The file as given.
        hash: sha256 of the file.
        documents: The texts; each is predicted from its start, without the one before.
    """

    name: str
    source: str
    hash: str
    documents: tuple[str, ...]

    kind: ClassVar[Literal["text"]] = "text"

    @property
    def unit(self) -> str:
        """What an item is: a document, or a window if there is only one document."""
        return "document" if len(self.documents) > 1 else "window"


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question.

    Args:
        context: Text before each choice.
        choices: The continuations, appended to the context as they are.
        gold: Index of the right choice.
        where: File and line, for messages.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    where: str


@dataclass(frozen=True)
class ChoiceTask:
    """Multiple-choice questions.

    Args:
        name: Name in tables and results.
        source: The file as given.
        hash: sha256 of the file.
        questions: The questions.
    """

    name: str
    source: str
    hash: str
    questions: tuple[Question, ...]

    kind: ClassVar[Literal["choices"]] = "choices"
    unit = "question"


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval.

    Args:
        name: Name in tables and results.
        source: Name of the task in lm-eval, or a YAML file in its format.
        hash: sha256 of the file, or of the name.
    """

    name: str
    source: str
    hash: str

    kind: ClassVar[Literal["lm-eval"]] = "lm-eval"
    unit = "document"


Task = TextTask | ChoiceTask | HarnessTask


def load_tasks(given: Sequence[str | Path] | Mapping[str, str | Path]) -> list[Task]:
    """Load tasks.

    Args:
        given: Files or names of tasks of lm-eval, optionally as `NAME=FILE`, or a mapping from names. Without a name,
            a task is named by its file name up to the first dot.

    Raises:
        TaskError: A file is missing, empty or malformed, or two tasks have the same name.
    """
    pairs = [*given.items()] if isinstance(given, Mapping) else [_split(str(each)) for each in given]
    if not pairs:
        raise TaskError("tasks: none given; give text files (.txt), questions (.jsonl) or names of tasks of lm-eval")
    tasks = [_load(name, str(source)) for name, source in pairs]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            sources = " and ".join(task.source for task in tasks if task.name == name)
            raise TaskError(f"tasks: {count} are named {name!r}: {sources}; give names of your own: NAME=FILE")
    return tasks


def _split(text: str) -> tuple[str | None, str]:
    match = _NAMED.fullmatch(text)
    if match is None or exists(text):
        return None, text
    return match[1], match[2]


def _load(name: str | None, source: str) -> Task:
    path = _path(source)
    if not exists(path) and path.suffix not in SUFFIXES and "/" not in source:
        return HarnessTask(name or source, source, hashlib.sha256(source.encode()).hexdigest())
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} {meaning}" for suffix, meaning in SUFFIXES.items())
        raise TaskError(
            f"{source}: what a {path.suffix or 'file without suffix'} holds is not known; known are {kinds}"
        )
    data = _read(path, source)
    name = name or path.name.partition(".")[0] or path.name
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix in (".yaml", ".yml"):
        return HarnessTask(name, source, digest)
    text = _decode(data, source)
    if path.suffix == ".txt":
        return TextTask(name, source, digest, (text,))
    return _load_lines(name, source, digest, text)


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise TaskError(f"{source}: there is no such home folder") from None


def _read(path: Path, source: str) -> bytes:
    try:
        return read_file(path, _MAX_BYTES)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise TaskError(f"{source}: there is no such file.{near}") from None
    except OSError as error:
        raise TaskError(f"{source}: cannot be read: {os_reason(error)}") from None


def _decode(data: bytes, source: str) -> str:
    try:
        # utf-8-sig drops a byte order mark
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{source}: is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not text.strip():
        raise TaskError(f"{source}: is empty; there is nothing to measure")
    return text


def _load_lines(name: str, source: str, digest: str, text: str) -> Task:
    """Read JSONL: documents if the first line has the key `text`, otherwise questions."""
    # not splitlines: JSON strings may contain U+2028 and other Unicode line ends
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    parsed = [(f"{source}:{number}", _object(f"{source}:{number}", line)) for number, line in lines]
    if "text" in parsed[0][1]:
        return TextTask(name, source, digest, tuple(_document(where, line) for where, line in parsed))
    return ChoiceTask(name, source, digest, tuple(_question(where, line) for where, line in parsed))


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
        # A lone surrogate such as \\ud800 is not a character, and no tokenizer accepts it.
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise TaskError(f"{where}: holds half of a surrogate pair, which is not text") from None
    except RecursionError:
        raise TaskError(f"{where}: is not JSON: it is nested too deeply; each line must hold one object") from None
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise TaskError(f"{where}: is not JSON: {reason}; each line must hold one object") from None
    if not isinstance(parsed, dict):
        raise TaskError(f"{where}: expected an object with {', '.join(_QUESTION_KEYS)}, or with text, got {line[:60]}")
    return parsed


def _document(where: str, line: Mapping[str, Any]) -> str:
    text = _value(where, line, "text", ("text",))
    if not isinstance(text, str) or not text.strip():
        raise TaskError(f"{where}: text must be a text that is not empty, got {brief(text)}")
    return text


def _question(where: str, line: Mapping[str, Any]) -> Question:
    context, choices, gold = (_value(where, line, key, _QUESTION_KEYS) for key in _QUESTION_KEYS)
    if not isinstance(context, str):
        raise TaskError(f"{where}: context must be a text, got {brief(context)}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise TaskError(
            f"{where}: choices must be a list of two or more texts that are not empty, got {brief(choices)}"
        )
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise TaskError(
            f"{where}: gold must be the index of the right choice, 0 to {len(choices) - 1}, got {brief(gold)}"
        )
    return Question(context, tuple(choices), gold, where)


def _value(where: str, line: Mapping[str, Any], key: str, keys: Sequence[str]) -> Any:
    if key not in line:
        other = next((k for k in line if k not in keys and did_you_mean(k, [key])), None)
        hint = f" Is {other!r} meant to be {key!r}?" if other else ""
        raise TaskError(f"{where}: {key!r} is missing.{hint} Found: {', '.join(line) or 'nothing'}")
    return line[key]


def glued(task: ChoiceTask) -> bool:
    """Return whether white space separates no choice of a task from its context, in most languages a mistake."""
    return not any(q.context[-1:].isspace() or c[:1].isspace() for q in task.questions for c in q.choices)
