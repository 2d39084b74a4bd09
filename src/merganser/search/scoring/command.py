"""Figures of a model from an external command that prints JSON."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ...errors import TaskError
from ...evaluation.scoring.estimate import Estimate
from ...system import end_session
from .bench import Failed

PLACE = "{model}"
"""Where the command gets the folder of the model."""

_SHOWN = 200
_MOST = 10_000_000


def parse_command(text: str) -> list[str]:
    """Split a command into words, as a shell does, without running one.

    Raises:
        TaskError: It is empty, has an open quote, or no place for the model.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise TaskError(f"command: {text!r} cannot be read: {error}") from None
    if not words:
        raise TaskError("command: is empty; give one such as 'python score.py {model}'")
    if not any(PLACE in word for word in words):
        raise TaskError(f"command: {text!r} has no {PLACE}, where the folder of the merged model is put")
    return words


def run_command(words: list[str], model: Path, timeout: float, wanted: Mapping[str, object]) -> dict[str, Estimate]:
    """Run a command on a model, and return the figures that it prints.

    Args:
        words: From `parse_command`.
        model: Folder of the model.
        timeout: Seconds after which it is ended, with all that it started.
        wanted: Names of the figures that it must print; others are ignored.

    Returns:
        The figures, without standard errors.

    Raises:
        Failed: It cannot be started, fails, takes too long, or prints something else.
    """
    command = [word.replace(PLACE, str(model)) for word in words]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Failed(f"the command cannot be started: {command[0]}: {reason}") from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"the command took longer than {timeout:g} seconds, and was ended") from None
        finally:
            # what it started and left behind is of its session
            end_session(process)
    if process.returncode:
        last = err.decode(errors="replace").strip().rpartition("\n")[2][:_SHOWN]
        raise Failed(f"the command failed with code {process.returncode}" + (f": {last}" if last else ""))
    return _figures(out[-_MOST:].decode(errors="replace"), wanted)


def _figures(text: str, wanted: Mapping[str, object]) -> dict[str, Estimate]:
    if not text.strip():
        raise Failed("the command printed nothing; it must print a JSON object of numbers")
    last = text.strip().rpartition("\n")[2]
    found = None
    for candidate in (text, last):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(candidate)
            break
    if not isinstance(found, dict):
        raise Failed(f"the command printed no JSON object, but {last[:_SHOWN]!r}")
    figures = {}
    for name in wanted:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            known = ", ".join(map(str, found)) or "nothing"
            raise Failed(f"the command gave no number for {name!r}; it printed {known}"[: 2 * _SHOWN])
        if not math.isfinite(value):
            raise Failed(f"the command gave {value} for {name!r}, which is not a finite number")
        figures[name] = Estimate(float(value))
    return figures
