"""The index of the sidecars: how each task is restored, as JSON."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import Checkpoint
from ...checkpoint.files.sidefiles import copy_file
from ..output.digests import Digests
from ..plan.plan import Plan
from ..plan.sections.sidecars import FOLDER, INDEX_FILE, SHARED, SidecarPlan
from ..plan.tensor import PlannedTensor, holds
from .make import Errors
from .plan import needs_base

INDEX_FORMAT = 1


def write_index(
    plan: Plan, sidecars: SidecarPlan, folder: Path, errors: Mapping[str, Errors], digests: Digests
) -> tuple[list[str], dict[str, Any]]:
    """Write the index, and copies of the tasks' files that differ from the output's.

    Args:
        plan: The plan.
        sidecars: Its sidecars; their parts are written.
        folder: The output; all its other files are written.
        errors: From `make_sidecars`.
        digests: Hashes of the input tensors.

    Returns:
        Relative paths of all sidecar files, and their entry in the run record.

    Raises:
        CheckpointError: A file of a task cannot be read.
        OSError: The target cannot be written.
    """
    tasks = []
    written = [INDEX_FILE, *(shard.name for shard in sidecars.shards)]
    for position, task in enumerate(sidecars.tasks):
        files = _side_files(plan.checkpoints[task.reference], folder, task.name)
        own = [name for name in files.values() if name.startswith(f"{FOLDER}/")]
        written += own
        tasks.append({"name": task.name, "model": task.model, "parts": _files(sidecars, position), "files": files})
    index = {
        "format": INDEX_FORMAT,
        "method": plan.method.name,
        "version": plan.method.version,
        "base": _base(plan) if sidecars.needs_base else None,
        "shared": _files(sidecars, SHARED),
        "tasks": tasks,
        **_tensors(plan, sidecars, digests),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")
    return written, describe(plan, sidecars, errors)


def describe(plan: Plan, sidecars: SidecarPlan, errors: Mapping[str, Errors]) -> dict[str, Any]:
    """Return the sidecars' entry in the run record: for each task, its size and the error of its restored model."""
    return {
        "shared_bytes": sidecars.shared_bytes,
        "needs_base": sidecars.needs_base,
        "tasks": [
            {
                "name": task.name,
                "model": task.model,
                "bytes": task.nbytes,
                "full_bytes": task.full_bytes,
                "share": round(task.nbytes / max(task.full_bytes, 1), 6),
                **_accuracy(position, errors),
            }
            for position, task in enumerate(sidecars.tasks)
        ],
    }


def _accuracy(task: int, errors: Mapping[str, Errors]) -> dict[str, Any]:
    """Return the relative errors of restoring a task: over the whole model, and of the worst tensor."""
    total, model, delta = (
        math.fsum(rows[task] for rows in columns)
        for columns in zip(*(found.rows() for found in errors.values()), strict=True)
    )
    each = {name: relative(found.error[task], found.model[task]) for name, found in errors.items()}
    worst = max(each, key=lambda name: math.inf if each[name] is None else float(each[name] or 0))
    return {
        "error": relative(total, model),
        "error_of_task_vector": relative(total, delta),
        "worst": {"tensor": worst, "error": each[worst]},
    }


def relative(error: float, of: float) -> float | None:
    """Return the ratio of two norms, given their squares; None if it is not finite."""
    if error == 0:
        return 0.0
    found = math.sqrt(error / of) if of > 0 and error >= 0 else math.inf
    # JSON cannot express NaN and infinity
    return found if math.isfinite(found) else None


def _tensors(plan: Plan, sidecars: SidecarPlan, digests: Digests) -> dict[str, Any]:
    """Return for each tensor how it is restored: "own", "merged", or from parts with given parameters."""
    settings: dict[int, int] = {}
    parameters: list[Mapping[str, Any]] = []
    tensors: dict[str, Any] = {}
    for tensor in plan.tensors:
        dtypes = [model.dtype.name if holds(tensor, i) else None for i, model in enumerate(tensor.models)]
        entry: dict[str, Any] = {"dtypes": dtypes if len(set(dtypes)) > 1 else dtypes[0]}
        if tensor.name in sidecars.kept:
            entry["kept"] = sidecars.kept[tensor.name]
        else:
            if id(tensor.parameters) not in settings:
                settings[id(tensor.parameters)] = len(parameters)
                parameters.append(tensor.parameters)
            entry["parameters"] = settings[id(tensor.parameters)]
            if tensor.compute_dtype.name == "float64":
                entry["wide"] = True
            if needs_base(plan.method, tensor.parameters):
                entry |= _base_tensor(tensor, digests)
        tensors[tensor.name] = entry
    return {"parameters": parameters, "tensors": tensors}


def _base_tensor(tensor: PlannedTensor, digests: Digests) -> dict[str, Any]:
    assert tensor.base is not None
    files, name = tensor.base.place
    return {"base": tensor.base.name, "xxh3_128": digests[files][name].hex()}


def _base(plan: Plan) -> dict[str, str | None]:
    """Return where the base was found: on this machine, or on the Hub."""
    reference = plan.recipe.base_model
    assert reference is not None
    path = Path(reference.path).expanduser()
    return {
        "model": reference.path,
        "revision": reference.revision,
        "path": str(path.resolve()) if path.exists() else None,
    }


def _files(sidecars: SidecarPlan, owner: int) -> list[str]:
    return [s.name for s, found in zip(sidecars.shards, sidecars.owners, strict=True) if found == owner]


def _side_files(checkpoint: Checkpoint, folder: Path, task: str) -> dict[str, str]:
    """Copy a task's files that differ from the output's; return each file's path relative to the output."""
    sources: Sequence[Path] = checkpoint.side_files
    config = checkpoint.path / "config.json"
    if checkpoint.config:
        sources = [config, *sources]
    found = {}
    for source in sources:
        name = source.relative_to(checkpoint.path).as_posix()
        same = (folder / name).is_file() and filecmp.cmp(source, folder / name, shallow=False)
        if not same:
            copy_file(source, folder / FOLDER / task / name)
        found[name] = name if same else f"{FOLDER}/{task}/{name}"
    return found
