"""Find what a routed model chooses among: the tasks of a merge with sidecars, adapters of one base, or fine-tunes of it."""

from __future__ import annotations

from pathlib import Path

from ...adapters import is_adapter, split_reference
from ...engine.plan.sections.sidecars import INDEX_FILE
from ...errors import NotFoundError
from ...jsonfile import exists
from .folders import folder_tasks, is_model
from .sidecars import sidecar_tasks
from .tasks import TaskSet

__all__ = ["open_tasks"]


def open_tasks(reference: str | Path, *, cache_dir: Path | None = None) -> TaskSet:
    """Open the tasks that a routed model chooses among; nothing but headers is read.

    Args:
        reference: A merge with sidecars; a folder with a folder for each adapter, all of one base; or `BASE+FOLDER`, if
            the base is not where the adapters say, or if the folder holds fine-tunes in place of adapters.
        cache_dir: Folder for models from the Hub.

    Raises:
        NotFoundError: There are no sidecars and no adapters.
        CheckpointError: They are damaged, or of different bases.
    """
    text = str(reference)
    base, folder = (None, text) if exists(text) else split_reference(text)
    if folder is None:
        base, folder = None, text
    path = Path(folder).expanduser()
    if base is None and (path / INDEX_FILE).exists():
        return sidecar_tasks(path, cache_dir)
    if not path.is_dir():
        raise NotFoundError(f"{path}: {'is not a folder' if path.exists() else 'no such folder'}")
    each = sorted(entry for entry in path.iterdir() if entry.is_dir())
    found = [entry.name for entry in each if is_adapter(str(entry))]
    if not found and base is not None:
        found = [entry.name for entry in each if is_model(entry)]
    if not found:
        model = next((entry.name for entry in each if is_model(entry)), None)
        raise NotFoundError(
            f"{path}: has no sidecars (sidecars/index.json) and no folders of adapters (adapter_config.json), so there are "
            f"no tasks to choose from{'' if model is None else _of_models(model, path)}"
        )
    return folder_tasks(path, tuple(found), base, text, cache_dir)


def _of_models(model: str, path: Path) -> str:
    return (
        f"; to choose among models such as {model}, name their base: BASE+{path}; "
        f"models of unequal sizes need none: merganser route {path} --gates mergeme --data TASK=FILE ..."
    )
