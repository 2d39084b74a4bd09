"""What gates belong to: tasks of a shared model; or a file of gates that holds the parts itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ....adapters import split_reference
from ....errors import NotFoundError
from ....inference.stored import Source, open_stored
from ..finding import open_tasks
from ..tasks import TaskSet
from .stored import GATES_FILE, read_gates

__all__ = ["Belonging", "open_belonging"]


@dataclass(frozen=True)
class Belonging:
    """What gates belong to.

    Args:
        name: What the user calls it.
        names: Names of the tasks.
        shared: The shared model.
        tasks: The tasks; None where the file of the gates holds the parts, and the tasks are not there.
        file: The file of the gates.
        recorded: The folder whose run record lists it; None if there is no record.
    """

    name: str
    names: tuple[str, ...]
    shared: Source
    tasks: TaskSet | None
    file: Path
    recorded: Path | None


def open_belonging(reference: str | Path | TaskSet, *, cache_dir: Path | None = None) -> Belonging:
    """Open what gates belong to; nothing but headers is read.

    Args:
        reference: As for `open_tasks`, or what it returned; or a folder with gates that hold the parts, alone or as
            `BASE+FOLDER`.
        cache_dir: Folder for models from the Hub.

    Raises:
        NotFoundError: There are no tasks, and no gates with parts.
        CheckpointError: They are damaged.
    """
    try:
        tasks = reference if isinstance(reference, TaskSet) else open_tasks(reference, cache_dir=cache_dir)
    except NotFoundError:
        base, folder = split_reference(str(reference))
        path = Path(folder or base).expanduser() / GATES_FILE
        found = read_gates(path) if path.exists() else None
        if found is None or found.parts is None:
            raise
        shared = open_stored(base if folder else found.base, cache_dir=cache_dir)
        return Belonging(str(reference), found.tasks, shared, None, path, None)
    return Belonging(tasks.name, tasks.tasks, tasks.shared, tasks, tasks.router.with_name(GATES_FILE), tasks.recorded)
