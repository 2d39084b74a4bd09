"""The run record, `merge.json`: its format, how it is read back, and how an output is verified against it."""

from .format import RECORD_FORMAT, RECORD_NAME, record_text
from .verification import verify

__all__ = ["RECORD_FORMAT", "RECORD_NAME", "record_text", "verify"]
