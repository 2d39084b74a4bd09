"""Every error that a user may see.

    MergeError                 the root class; exit code 2: the user can fix it
    ├── RecipeError            (ValueError)   the recipe: syntax, keys, references, counts
    │   └── ParameterError                    a method's parameter: name, type, range, count
    ├── CheckpointError        (ValueError)   a checkpoint: header, index, config, shapes, dtypes
    │   ├── NotFoundError      (FileNotFoundError)   a model, file or tensor that is not there
    │   ├── NonFiniteError                    NaN or infinity in an input or result
    │   └── UnreachableError                  the Hub stopped answering; the same command continues
    ├── MethodError                       a merge method of a third party: what it raises or returns
    ├── TaskError              (ValueError)   an evaluation's task: file, line, name
    ├── DataError              (ValueError)   calibration data and statistics of it: file, line, key
    ├── OutputError            (OSError)      the target: exists, locked, no room, not writable
    ├── MemoryLimitError       (MemoryError)  the work does not fit the memory limit
    └── UnsupportedError       (NotImplementedError)  understood, and not available in this version

Messages read `where: what is wrong, what was found, what is allowed or what to do`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = [
    "CheckpointError",
    "DataError",
    "MemoryLimitError",
    "MergeError",
    "MethodError",
    "NonFiniteError",
    "NotFoundError",
    "OutputError",
    "ParameterError",
    "RecipeError",
    "TaskError",
    "UnreachableError",
    "UnsupportedError",
    "did_you_mean",
    "suggest_keywords",
]

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class MergeError(Exception):
    """An error that the user can fix. The command line prints the message and exits with 2."""


class RecipeError(MergeError, ValueError):
    """The recipe is not valid."""


class ParameterError(RecipeError):
    """A parameter of a merge method is unknown, out of range, or has the wrong type or number of values."""


class CheckpointError(MergeError, ValueError):
    """A checkpoint cannot be read, or does not match the other models of the merge."""


class NotFoundError(CheckpointError, FileNotFoundError):
    """A model, file or tensor does not exist."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""


class UnreachableError(CheckpointError):
    """The Hub stopped answering while a model was read from it; what was merged by then is kept."""


class MethodError(MergeError):
    """A merge method of a third party raised an error, or returned what it must not."""


class TaskError(MergeError, ValueError):
    """A task of an evaluation does not exist, is malformed, or does not suit the model."""


class DataError(MergeError, ValueError):
    """Calibration data, or statistics of it, are missing or malformed, or do not fit the model."""


class OutputError(MergeError, OSError):
    """The output cannot be written."""


class MemoryLimitError(MergeError, MemoryError):
    """The work needs more memory than its limit allows."""


class UnsupportedError(MergeError, NotImplementedError):
    """The request is valid, but this version does not support it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` with the closest of `known`, or an empty string if none is close."""
    spellings = {_folded(each): each for each in known}
    near = difflib.get_close_matches(_folded(str(word)), list(spellings), n=1, cutoff=0.6)
    return f" Did you mean {spellings[near[0]]!r}?" if near else ""


def suggest_keywords(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Answer an unknown keyword argument of a public function with the one that was probably meant.

    Raises:
        TypeError: When the function is called with one.
    """
    known = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.POSITIONAL_ONLY]

    @wraps(function)
    def checked(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{function.__name__}: unknown argument {name!r}.{did_you_mean(name, known)} "
                    f"{function.__name__} takes {', '.join(known)}"
                )
        return function(*args, **kwargs)

    return checked


def _folded(word: str) -> str:
    """Return a word without differences that are easily confused: capitals, hyphens, spaces."""
    return word.strip().casefold().replace("-", "_").replace(" ", "_")
