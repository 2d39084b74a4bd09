"""Match the modules of an adapter to the entries of `rank_pattern` or `alpha_pattern`.

The keys are untrusted regular expressions, and Python would match one such as `(a+)+$` practically forever. Keys that
are plain names, which most are, are matched in this process; all others in a separate process with a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["PatternError", "first_matches"]

_PLAIN = re.compile(r"[\w.-]*")
_MOST_HERE = 1_000_000
"""Largest number of pairs of a key and a module that are matched in this process."""

_SECONDS = 20.0

# As peft looks up a module: the first key that matches the whole name, or the end of the name after a dot.
_FORM = r"(.*\.)?({})$"

_SCRIPT = """
import json, re, sys
keys, modules, form = json.load(sys.stdin)
compiled = []
for key in keys:
    try:
        compiled.append(re.compile(form.replace("{}", key)))
    except Exception as error:
        print(json.dumps({"key": key, "error": str(error) or type(error).__name__}))
        sys.exit()
first = [next((i for i, pattern in enumerate(compiled) if pattern.match(module)), None) for module in modules]
print(json.dumps({"first": first}))
"""


class PatternError(Exception):
    """A key is not a regular expression, or matching takes too long; the caller adds the file to the message."""


def first_matches(keys: Sequence[str], modules: Sequence[str]) -> list[int | None]:
    """Return for each module the index of the first key that matches it; None if no key does.

    Args:
        keys: Regular expressions for the ends of names.
        modules: Names of modules.

    Raises:
        PatternError: A key is not a regular expression, or matching takes too long.
    """
    if len(keys) * len(modules) > _MOST_HERE or not all(_PLAIN.fullmatch(key) for key in keys):
        return _elsewhere(keys, modules)
    compiled = [re.compile(_FORM.format(key)) for key in keys]
    return [next((i for i, pattern in enumerate(compiled) if pattern.match(module)), None) for module in modules]


def _elsewhere(keys: Sequence[str], modules: Sequence[str]) -> list[int | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SCRIPT],
            input=json.dumps([list(keys), list(modules), _FORM]).encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise PatternError(
            f"matching the keys with {len(modules)} modules takes more than {_SECONDS:g} seconds; write the names of modules"
        ) from None
    except (subprocess.CalledProcessError, OSError):
        raise PatternError("the keys cannot be matched; write the names of modules") from None
    found = json.loads(done.stdout)
    if "error" in found:
        raise PatternError(f"{found['key']!r} is not a regular expression: {found['error']}")
    first: list[int | None] = found["first"]
    return first
