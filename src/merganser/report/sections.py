"""The sections of a report, in order: the verdict, scores, what was merged, how far it moved, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.stored import Evaluation
from ..inspection.spectra import Spectra
from ..method.description import describe
from ..record.reading import InputFile, Record
from ..wording import count_text, default_names, plural, size_text, time_text
from .blocks import Block, Cell, Code, List, Number, Paragraph, Section, Table, number
from .movement import Names, length_text, moved_section, related_section
from .scores import scores_section
from .singular import spectra_section
from .verdict import verdict_section

__all__ = ["sections", "summary"]


def summary(record: Record) -> str:
    """Return what was merged, in one line."""
    seconds = record.timings.get("seconds")
    return " · ".join(
        [
            record.method,
            plural(len(record.models), "checkpoint"),
            plural(record.tensors, "tensor"),
            f"{count_text(record.parameters)} parameters",
            ", ".join(record.dtypes),
            *([] if seconds is None else [time_text(seconds)]),
            record.created,
        ]
    )


def sections(record: Record, evaluation: tuple[Evaluation, str] | None, spectra: Spectra | None) -> list[Section]:
    """Return the sections of a report.

    Args:
        record: The run record.
        evaluation: An evaluation, and the merge's hash in it; None without an evaluation.
        spectra: Singular values of task vectors; None if they were not requested.
    """
    short = dict(zip(record.models, default_names(record.models), strict=True))

    def name(model: str) -> str:
        return short.get(model, model)

    # said once: in the verdict if nothing was measured, else where the movement is
    length = length_text(record)
    drawn = [verdict_section(record, evaluation, length)]
    if evaluation is not None:
        drawn.append(scores_section(record, *evaluation))
    drawn += [
        _merged(record, name),
        moved_section(record, name, length if evaluation is not None else ""),
        related_section(record, name),
    ]
    if spectra is not None:
        drawn.append(spectra_section(spectra, name))
    if record.restored:
        drawn.append(_restored(record))
    return [*drawn, Section("Recipe", [Code(record.recipe)]), _files(record, name), _run(record)]


def _merged(record: Record, name: Names) -> Section:
    from ..method.registry import methods

    blocks: list[Block] = []
    method = methods().get(record.method)
    if method is not None:
        described = describe(method)
        source = f" {described.citation}." if described.citation else ""
        blocks.append(Paragraph(f"{record.method}: {described.summary}{source}"))
    if record.differences:
        blocks.append(List("differs from mergekit", record.differences))
    inputs = record.movement.inputs if record.movement is not None else ()
    base = inputs[0] if inputs and record.movement is not None and record.movement.from_base else None
    rows: list[list[Cell]] = []
    for model in record.models:
        files = [file for file in record.inputs if file.model == model]
        roles = [word for word, yes in (("base", model == base), ("donor", model == record.donor)) if yes]
        size = sum(file.bytes for file in files)
        read, held = sum(file.tensors_read for file in files), sum(file.tensors for file in files)
        cells: list[Cell] = [name(model), ", ".join(roles), Number(size, size_text(size), "inputs[].bytes")]
        rows.append([*cells, Number(read, f"{read:,} of {held:,}", "inputs[].tensors_read"), model])
    blocks.append(Table(["", "used as", "files", "tensors read", "from"], rows, "merge.json: models, donor, inputs[]"))
    if len(record.methods) > 1:
        counts: list[list[Cell]] = [
            [method, Number(count, f"{count:,}", f"methods.{method}")] for method, count in record.methods.items()
        ]
        blocks.append(Table(["merged by", "tensors"], counts, "merge.json: methods"))
    return Section("What was merged", blocks)


def _restored(record: Record) -> Section:
    rows: list[list[Cell]] = []
    for i, task in enumerate(record.restored):
        place = f"sidecars.tasks[{i}]"
        size = Number(task.bytes, size_text(task.bytes), f"{place}.bytes")
        full = Number(task.full_bytes, size_text(task.full_bytes), f"{place}.full_bytes")
        rows.append([task.name, task.model, size, full, number(task.error, f"{place}.error")])
    head = ["task", "model", "sidecar", "whole model", "relative error of the restored weights"]
    return Section("Sidecars", [Table(head, rows, "merge.json: sidecars.tasks[]")])


def _short(file: InputFile, name: Names) -> str:
    """Return the name of a file that was read, below the short name of its model; its place is in `merge.json`."""
    return f"{name(file.model)}/{Path(file.path).name}"


def _files(record: Record, name: Names) -> Section:
    written: list[Sequence[Cell]] = [
        [file.file, Number(file.bytes, f"{file.bytes:,}", f"outputs[{i}].bytes"), file.sha256]
        for i, file in enumerate(record.outputs)
    ]
    read: list[Sequence[Cell]] = [
        [_short(file, name), Number(file.bytes, f"{file.bytes:,}", f"inputs[{i}].bytes"), file.hash]
        for i, file in enumerate(record.inputs)
    ]
    return Section(
        "Files and hashes",
        [
            Table(["written", "bytes", "sha256"], written, "merge.json: outputs[]"),
            Table(["read", "bytes", "xxh3-128 of the tensors read"], read, "merge.json: inputs[]"),
            Paragraph("Whether they are still as they were written is not checked here; this checks it:"),
            Code(f"merganser verify {record.out}"),
        ],
    )


def _run(record: Record) -> Section:
    rows: list[list[Cell]] = [[name, version] for name, version in record.versions.items()]
    rows += [
        ["device", record.device],
        ["threads", Number(record.workers, str(record.workers), "workers")],
        ["fused kernels", "yes" if record.compiled else "no"],
        ["continued after an interruption", "yes" if record.continued else "no"],
        ["seed", "none" if record.seed is None else Number(record.seed, str(record.seed), "seed")],
        ["compat", record.compat or "none"],
    ]
    rows += [
        [name.replace("_", " "), Number(value, f"{value:.3f}", f"timings.{name}")]
        for name, value in record.timings.items()
    ]
    return Section("The run", [Table(["", ""], rows, "merge.json: versions, device, workers, seed, timings")])
