"""Name and format of the run record, for all who write or read one."""

from __future__ import annotations

__all__ = ["RECORD_FORMAT", "RECORD_NAME"]

RECORD_NAME = "merge.json"
RECORD_FORMAT = 1
"""Changes when what reads a record could misunderstand it; a new key does not change it."""
