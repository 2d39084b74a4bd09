"""Names and markers of the files that describe a merge in its folder, shared by all code that writes or reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PAGE_GENERATOR", "PAGE_NAME", "RECORD_FORMAT", "RECORD_NAME", "is_page", "record_text"]

RECORD_NAME = "merge.json"
RECORD_FORMAT = 1
"""Increased when an older reader would misunderstand the record; a new key alone does not increase it."""

PAGE_NAME = "report.html"
"""Default name of the report page in a merge's folder."""
PAGE_GENERATOR = '<meta name="generator" content="merganser '
"""Beginning of the line near the top of such a page that identifies merganser; the version follows."""


def is_page(file: Path) -> bool:
    """Return whether a file is a report page of merganser.

    Raises:
        OSError: The file cannot be read.
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
