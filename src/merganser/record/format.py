"""Names and marks of what is written about a merge into its folder, for all who write or read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PAGE_GENERATOR", "PAGE_NAME", "RECORD_FORMAT", "RECORD_NAME", "is_page", "record_text"]

RECORD_NAME = "merge.json"
RECORD_FORMAT = 1
"""Raised when older readers would misunderstand a new record; a new key alone does not raise it."""

PAGE_NAME = "report.html"
"""Name of the page that shows a merge, in its folder, unless another is asked for."""
PAGE_GENERATOR = '<meta name="generator" content="merganser '
"""What begins the line near the top of such a page that tells who drew it; the version follows."""


def is_page(file: Path) -> bool:
    """Return whether a file is a page that merganser drew.

    Raises:
        OSError: It cannot be read.
    """
    if not file.is_file():
        return False
    with file.open("rb") as page:
        return PAGE_GENERATOR.encode() in page.read(1000)


def record_text(record: Mapping[str, Any]) -> str:
    """Return a run record as JSON, with each entry of a list on one line."""
    return _lines(record, "\n") + "\n"


def _lines(value: Any, indent: str) -> str:
    # json.dumps(indent=...) is many times slower, and puts every number on its own line
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if not any(isinstance(part, Mapping | list) for part in parts):
        return json.dumps(value)
    if isinstance(value, Mapping):
        lines = [f"{json.dumps(str(key))}: {_lines(part, indent + ' ')}" for key, part in value.items()]
        return f"{{{indent} {f',{indent} '.join(lines)}{indent}}}"
    return f"[{indent} {f',{indent} '.join(map(json.dumps, value))}{indent}]"
