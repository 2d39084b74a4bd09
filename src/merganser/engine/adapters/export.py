"""Export the low-rank sidecars of a merge as adapters of peft, one per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...anatomy import Anatomy, infer_anatomy
from ...checkpoint import Checkpoint, Reader, open_checkpoint
from ...errors import CheckpointError, OutputError, UnsupportedError
from ...jsonfile import read_object
from ...process import one_thread
from ...version import __version__
from ...wording import plural
from ..output.staging import check_target, lies_in, resolve_target
from ..plan.sections.sidecars import INDEX_FILE
from ..sidecars.restoration import intact, open_base, read_sidecar_record, refuse_source
from .writing import TRANSPOSED, Spool, config_on, low_rank_names, norm_of, write_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from ..sidecars.read import Restorer, StoredTask, StoredTensor

__all__ = ["Exported", "export_adapters"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """One adapter that `export_adapters` wrote.

    Args:
        task: Name of the task.
        out: Its folder.
        record: Its record, as in its `merge.json`.
    """

    task: str
    out: Path
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Task:
    """A task to export; `start` is the model that the adapter is loaded on, under the name `named`."""

    name: str
    stored: StoredTask
    base: Checkpoint | None
    start: Checkpoint
    named: str
    target: Path


def export_adapters(
    out: str | Path,
    folder: str | Path,
    *,
    tasks: Sequence[str] = (),
    base: str | None = None,
    overwrite: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[Exported]:
    """Write an adapter for each task of a merge whose sidecars are of low rank, as `FOLDER/TASK`.

    Matrices get the stored factors; other tensors that differ, such as norms, are stored whole (modules_to_save). The
    adapter is loaded on the merged model, or on the base of the merge if that is what the factors are added to.

    Args:
        out: Folder that a merge with sidecars wrote.
        folder: Where the adapters are written; each appears when it is complete.
        tasks: Names of tasks; by default all.
        base: The base of the merge, if it has moved; not every method needs it.
        overwrite: Replace adapters that merganser wrote before, unless something in them was added or changed.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of tensors done so far, and in total.

    Returns:
        One result for each task, with the error that its adapter leaves to the restored tensors.

    Raises:
        NotFoundError: The output, its sidecars, a task or the base is missing.
        UnsupportedError: A sidecar is not of low rank, or a tensor cannot be part of an adapter.
        CheckpointError: A file of the output is damaged, or the base is not that of the merge.
        OutputError: A target exists, or cannot be written.
    """
    from ..sidecars.read import read_task

    out, folder = Path(out), Path(folder)
    record = read_sidecar_record(out)
    intact(out, [INDEX_FILE])
    index = read_object(out / INDEX_FILE)
    merged = open_checkpoint(str(out))
    if lies_in(resolve_target(folder), out.resolve()):
        raise OutputError(f"{folder}: lies in {out}, which is read; choose another folder")
    opened = []
    for name in dict.fromkeys(tasks or [entry["name"] for entry in record["sidecars"]["tasks"]]):
        stored = read_task(out, index, name)
        opened.append(_open(out, name, stored, merged, base, folder / name, cache_dir))
        check_target(folder / name, overwrite=overwrite)
    named = {entry["file"] for entry in record["outputs"]}
    weights = [path.relative_to(out).as_posix() for path in merged.weight_files]
    intact(out, sorted(named & {*weights, *(part for task in opened for part in task.stored.parts)}))
    total, done = sum(len(task.stored.tensors) for task in opened), 0
    found = []
    for task in opened:

        def told(count: int, before: int = done) -> None:
            if progress:
                progress(before + count, total)

        found.append(_write(out, task, merged, overwrite, told))
        done += len(task.stored.tensors)
    return found


def _open(
    out: Path, name: str, stored: StoredTask, merged: Checkpoint, base: str | None, target: Path, cache_dir: Path | None
) -> _Task:
    """Check that a task can be exported, and find the model that its adapter is loaded on."""
    method = stored.method
    if method.sidecar is None or method.sidecar.factors is None:
        raise UnsupportedError(
            f"{out}: {method.name} stores no low-rank factors (twin and skillpack do), so its tasks are not adapters. An "
            f"adapter that approximates one: merganser restore {out} --task {name} --out DIR, then merganser extract "
            f"DIR --base {out} --rank N --out ADAPTER"
        )
    decoded = [tensor for tensor in stored.tensors if tensor.kept is None]
    packed = [tensor.name for tensor in decoded if len(merged.tensors[tensor.name].shape) != 2]
    if packed:
        raise UnsupportedError(
            f"{out}: {packed[0]} is {list(merged.tensors[packed[0]].shape)}; an adapter holds factors of matrices only"
        )
    starts = {tensor.base is not None for tensor in decoded}
    if len(starts) > 1:
        raise UnsupportedError(
            f"{out}: the parts of some tensors are added to the base, of others to the merged model (origin); an adapter "
            "has one base: merge with one origin"
        )
    from_base = starts == {True}
    opened = open_base(out, name, stored, base, cache_dir) if from_base else None
    refuse_source(target, out)
    if opened is None:
        return _Task(name, stored, None, merged, str(out), target)
    refuse_source(target, opened.path)
    for tensor in stored.tensors:
        own, of_base = merged.tensors[tensor.name], opened.tensors.get(tensor.name)
        if of_base is None or of_base.shape != own.shape or tensor.base not in (None, tensor.name):
            raise UnsupportedError(
                f"{opened.path}: {tensor.name} is missing there or has another shape; an adapter keeps both"
            )
    assert stored.base is not None
    return _Task(name, stored, opened, opened, base or str(stored.base.get("model")), target)


@dataclass
class _Work:
    """What was stored so far."""

    task: _Task
    restorer: Restorer
    reader: Reader
    spool: Spool
    ranks: dict[str, int] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = self.task.start
        shapes = {name: tensor.shape for name, tensor in start.tensors.items()}
        self.anatomy: Anatomy = infer_anatomy(shapes, start.config)
        self.transposed = start.config.get("model_type") in TRANSPOSED
        self.tied = {source: alias for alias, source in self.anatomy.tied if alias not in start.tensors}

    def add(self, tensor: StoredTensor) -> None:
        """Store one tensor: its factors, or the whole tensor if it differs."""
        import torch

        whole = torch.cat([piece for _, piece in self.restorer.pieces(tensor)] or [torch.empty(0)])
        whole = whole.reshape(self.restorer.shape(tensor))
        start = self.reader.tensor(self.task.start.tensors[tensor.name])
        if torch.equal(whole, start):
            return
        wide = torch.float64 if torch.float64 in (whole.dtype, start.dtype) else torch.float32
        norm = norm_of(whole.to(wide) - start.to(wide))
        if tensor.kept is not None:
            self._save(tensor.name, whole)
            self._note(tensor.name, "saved", norm, 0.0)
            return
        left, right = (side.float() for side in self.restorer.factors(tensor))
        rest = whole.to(wide) - (start.to(wide) + (left @ right).to(wide))
        self._factor(tensor.name, left, right)
        self._note(tensor.name, "factored", norm, norm_of(rest), left.shape[1])

    def _factor(self, name: str, left: Tensor, right: Tensor) -> None:
        if not name.endswith(".weight"):
            raise UnsupportedError(
                f"{name}: is not the weight of a module, and an adapter holds factors of these alone"
            )
        embedding = self.anatomy.parts[name].role == "embedding"
        self._store(name.removesuffix(".weight"), left, right, embedding=embedding)
        if name in self.tied:
            # peft would leave the tied head as in the base
            self._store(self.tied[name].removesuffix(".weight"), left, right, embedding=False)

    def _store(self, module: str, left: Tensor, right: Tensor, *, embedding: bool) -> None:
        if embedding or self.transposed:
            left, right = right.T, left.T
        a, b = low_rank_names(module, embedding=embedding)
        self.spool.add(a, right)
        self.spool.add(b, left)
        self.ranks[module] = left.shape[1]

    def _save(self, name: str, whole: Tensor) -> None:
        module, _, last = name.rpartition(".")
        weight = self.task.start.tensors.get(f"{module}.weight")
        if not whole.dtype.is_floating_point or last not in ("weight", "bias"):
            raise UnsupportedError(
                f"{name}: differs, and is not the weight or bias of a module; an adapter holds nothing else"
            )
        if last == "bias" and weight is not None and len(weight.shape) == 2:
            self.biases[module] = whole
            return
        for each in [name, *([self.tied[name]] if name in self.tied else [])]:
            self.spool.add(f"base_model.model.{each}", whole)
            if (own := each.rpartition(".")[0]) not in self.saved:
                self.saved.append(own)

    def _note(self, name: str, kept: str, norm: float, error: float, rank: int | None = None) -> None:
        entry = {"tensor": name, "kept": kept, "norm": norm, "error": error, "relative_error": error / norm}
        self.changes.append(entry if rank is None else {**entry, "rank": rank})


def _write(out: Path, task: _Task, merged: Checkpoint, overwrite: bool, told: Callable[[int], None]) -> Exported:
    from ..sidecars.read import Restorer, open_parts

    parts = open_parts([out / name for name in task.stored.parts])
    with Spool(task.target, overwrite=overwrite) as spool, Reader() as reader, one_thread():
        work = _Work(task, Restorer(out, task.stored, merged, parts, task.base, reader), reader, spool)
        for count, tensor in enumerate(task.stored.tensors, 1):
            work.add(tensor)
            told(count)
        spool.add_biases(work.biases, work.ranks)
        if not work.ranks:
            raise CheckpointError(f"{out}: task {task.name!r} has no factors above rank 0; an adapter needs some")
        return Exported(task.name, task.target, _finish(out, work, overwrite))


def _finish(out: Path, work: _Work, overwrite: bool) -> dict[str, Any]:
    task, spool = work.task, work.spool
    config = config_on(
        task.start,
        task.named,
        work.ranks,
        saved=work.saved,
        biases=bool(work.biases),
        transposed=work.transposed,
    )
    total, left = (math.sqrt(sum(entry[key] ** 2 for entry in work.changes)) for key in ("norm", "error"))
    exported = {
        "from": str(out),
        "task": task.name,
        "method": task.stored.method.name,
        "base": task.named,
        "ranks": sorted(set(work.ranks.values())),
        "error": left / total,
        "factored": sum(entry["kept"] == "factored" for entry in work.changes),
        "tied_in_factors": sorted(
            alias for source, alias in work.tied.items() if source.removesuffix(".weight") in work.ranks
        ),
        "saved": [entry["tensor"] for entry in work.changes if entry["kept"] == "saved"],
    }
    record = {
        "exported": exported,
        **spool.counts(),
        "changes": work.changes,
    }
    return write_adapter(spool, config, card=_card(task, exported), record=record, overwrite=overwrite)


def _card(task: _Task, exported: Mapping[str, Any]) -> str:
    return f"""---
library_name: peft
tags:
- lora
- merganser
---

# {task.name}

A LoRA adapter for `{Path(task.named).name}`, exported by Merganser {__version__} from the sidecar
({exported["method"]}) of a task: {plural(exported["factored"], "weight")} in factors, {plural(len(exported["saved"]), "tensor")} stored whole.
Error relative to what restoring the task changes: {exported["error"]:.4g}.
"""
