"""Find out whether a file of a folder is really inside that folder, or is a link to a file elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import CheckpointError, NotFoundError

__all__ = ["inside", "leads_out", "link_target"]


def leads_out(folder: Path, file: Path) -> bool:
    """Return whether links lead from `file`, a path below `folder`, out of that folder.

    The Hub's cache keeps file contents in `blobs` and fills the folder of a revision, `snapshots/<revision>`, with
    links to them: links into the blobs of the same repository are allowed.
    """
    home, target = folder.resolve(), file.resolve()
    return not target.is_relative_to(home) and target.parent not in _blobs(home)


def link_target(folder: Path, name: str) -> Path | None:
    """Return the real path of the file `name` of a folder if the path contains a link, else None.

    Links into the blobs of the Hub's cache are ignored; see `leads_out`.
    """
    home = folder.resolve()
    target = Path(os.path.realpath(folder / name))
    return None if target == home / name or target.parent in _blobs(home) else target


def _blobs(home: Path) -> Iterator[Path]:
    for above in home.parents:
        if above.name == "snapshots":
            yield above.parent / "blobs"


def inside(folder: Path, name: str, where: str) -> Path:
    """Return the path of the file `name` of a checkpoint's folder.

    Args:
        folder: The folder.
        name: Path of the file, relative to the folder.
        where: Where the file is named, for messages.

    Raises:
        NotFoundError: The file is a broken link.
        CheckpointError: The file is a link out of the folder: its target is not part of the checkpoint and must not be
            copied into an output.
    """
    file = folder / name
    try:
        if leads_out(folder, file):
            raise CheckpointError(
                f"{where}: file {name!r} is a link that leaves the checkpoint's folder (to {os.path.realpath(file)}); if it "
                "belongs to the model, put the file itself there"
            )
    except RuntimeError:  # circular links, in Python before 3.13
        raise CheckpointError(
            f"{where}: file {name!r} is a link that leads to itself; fetch the checkpoint again"
        ) from None
    if file.is_symlink() and not file.exists():
        raise NotFoundError(f"{where}: file {name!r} is a link to a file that is not there; fetch the checkpoint again")
    return file
