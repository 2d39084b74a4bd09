"""Write a router or gates beside the tasks that they belong to, as a file that `verify` and `--overwrite` know."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...errors import OutputError
from ...files import sha256_of_file, write_whole
from ...jsonfile import os_reason, read_object
from ...record.format import RECORD_NAME, record_text
from ...system import sync

__all__ = ["store_beside"]


def store_beside(path: Path, content: bytes, recorded: Path | None) -> None:
    """Write a router or gates, and list the file in the run record if there is one.

    Args:
        path: The file; an older one of ours is replaced.
        content: A file of safetensors, whose metadata name its format, tasks and shared model.
        recorded: The folder whose run record lists it; None without a record.

    Raises:
        NotFoundError: The folder has no run record.
        OutputError: A file of that name is not of merganser, or the file cannot be written.
    """
    record = None if recorded is None else read_object(recorded / RECORD_NAME)
    name = path.name if recorded is None else path.relative_to(recorded).as_posix()
    listed = [] if record is None else record["outputs"]
    others = [entry for entry in listed if entry["file"] != name]
    if os.path.lexists(path) and len(others) == len(listed) and not _is_ours(path):
        raise OutputError(f"{path}: exists, and merganser did not write it; move it away")
    write_whole(path, content)
    if record is None or recorded is None:
        return
    try:
        sync(path)
        entry = {"file": name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {os_reason(error)}") from None
    # a kill between the two files leaves a file that is not listed: making it again lists it
    write_whole(recorded / RECORD_NAME, record_text({**record, "outputs": [*others, entry]}))


def _is_ours(path: Path) -> bool:
    if path.is_symlink():
        return False
    try:
        with safe_open(path, "pt") as file:
            return {"format", "tasks", "shared"} <= (file.metadata() or {}).keys()
    except (SafetensorError, OSError):
        return False
