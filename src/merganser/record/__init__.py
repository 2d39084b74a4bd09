"""The run record, `merge.json`: its format, reading it back, and verifying an output against it."""

from .format import RECORD_FORMAT, RECORD_NAME, record_text
from .verification import verify

__all__ = ["RECORD_FORMAT", "RECORD_NAME", "record_text", "verify"]
