"""Finish an output after its last tensor: write the files besides the weights, and the run record."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import INDEX_NAME, index_json
from ..checkpoint.files.sidefiles import copy_file
from ..errors import CheckpointError, OutputError
from ..files import sha256_of_file
from ..record.format import RECORD_NAME, record_text
from .movement import layer_summary, length_warning, movement
from .output.digests import DIGEST, Digests, tensor_digest
from .plan.plan import Plan
from .plan.sections.sidecars import FOLDER
from .plan.sections.vocabulary import REPORT_NAME
from .record import input_files, input_hashes, make_record, model_card
from .sidecars.index import write_index
from .sidecars.make import Errors
from .stream.groups import Group
from .stream.sample import join_samples

Entries = Mapping[tuple[int, int], Mapping[str, Any]]
"""Journal entries by group and segment: what each task read and wrote."""


def write_rest(
    plan: Plan,
    folder: Path,
    title: str,
    *,
    claim: Callable[[Iterable[str]], None],
    groups: Sequence[Group],
    entries: Entries,
    hashes: Sequence[str],
    statistics: Mapping[str, Tensor],
    inputs: Sequence[Mapping[str, Any]],
    errors: Mapping[str, Errors],
    timings: Mapping[str, float],
    continued: bool,
) -> dict[str, Any]:
    """Write config, index, tokenizer, model card and run record.

    Args:
        plan: The plan.
        folder: Folder that holds the weights.
        title: Name of the output.
        claim: Called with the names of files before they are created.
        groups: All groups of the plan.
        entries: Their journal entries.
        hashes: sha256 of each shard.
        statistics: Statistics over the whole model, by name.
        inputs: From `input_files`, called before the first read.
        errors: Errors of restoring each tensor from the sidecars, by name.
        timings: Seconds per phase, for the record.
        continued: Whether this run continued an earlier one.

    Returns:
        The run record.

    Raises:
        CheckpointError: An input changed during the run, or a file to copy cannot be read.
        OSError: The target cannot be written.
    """
    for before, now in zip(inputs, input_files(plan), strict=True):
        if before != now:
            raise CheckpointError(f"{now['path']}: was changed while it was merged; merge again")
    digests = _tensor_digests(groups, entries)
    outputs = [{"file": s.name, "bytes": s.size, "sha256": h} for s, h in zip(plan.shards, hashes, strict=True)]
    claim([RECORD_NAME, *([f"{FOLDER}/"] if plan.sidecars is not None else [])])
    outputs += _write_side_files(plan, folder, title, claim)
    beside: dict[str, Any] = {}
    if plan.sidecars is not None:
        names, beside["sidecars"] = write_index(plan, plan.sidecars, folder, errors, digests)
        outputs += _hashed(folder, names)
    samples = join_samples(
        (groups[index].tensors, entry.get("sample", ())) for (index, _), entry in sorted(entries.items())
    )
    moved = movement(plan, samples)
    record = make_record(
        plan,
        inputs=input_hashes(plan, digests),
        outputs=outputs,
        statistics={name: _json(solved.tolist()) for name, solved in statistics.items()},
        layers=layer_summary(plan.tensors, samples),
        movement=moved,
        warnings=[*plan.warnings, *filter(None, [length_warning(moved["total"])])],
        timings=timings,
        continued=continued,
    )
    record |= beside
    (folder / RECORD_NAME).write_text(record_text(record), encoding="utf-8")
    return record


def _json(value: Any) -> Any:
    """Return a number or nested list of numbers with None for infinity and NaN, which JSON cannot express."""
    if isinstance(value, list):
        return [_json(each) for each in value]
    return value if math.isfinite(value) else None


def side_file_bytes(plan: Plan) -> int:
    """Return the approximate number of bytes that `write_rest` writes."""
    sources = [*plan.side_files.values()]
    for task in plan.sidecars.tasks if plan.sidecars else ():
        sources += plan.checkpoints[task.reference].side_files
    return sum(source.stat().st_size for source in sources if source.exists()) + 1_000 * len(plan.tensors)


def _write_side_files(
    plan: Plan, folder: Path, title: str, claim: Callable[[Iterable[str]], None]
) -> list[dict[str, Any]]:
    """Write the files besides the weights; return their names, sizes and hashes."""
    claim(["README.md", *plan.side_files, *_planned_texts(plan)])
    (folder / "README.md").write_bytes(model_card(plan, title).encode(errors="backslashreplace"))
    return _hashed(folder, dict.fromkeys(["README.md", *write_planned_files(plan, folder)]))


def _planned_texts(plan: Plan) -> dict[str, bytes]:
    """Return the contents of generated files besides the weights (config, index, template), by name."""
    texts: dict[str, bytes] = {}
    if plan.vocabulary is not None:
        texts |= {**plan.vocabulary.texts, REPORT_NAME: plan.vocabulary.report}
    if plan.chat_template is not None:
        texts["chat_template.jinja"] = plan.chat_template.encode()
    for name, content in (("config.json", plan.config), ("generation_config.json", plan.generation_config)):
        if content:
            texts[name] = (json.dumps(content, indent=2) + "\n").encode()
    if len(plan.shards) > 1:
        texts[INDEX_NAME] = index_json(plan.shards)
    return texts


def write_planned_files(plan: Plan, folder: Path) -> list[str]:
    """Write config, index, tokenizer and template as planned; return the names of the files.

    Raises:
        CheckpointError: A file to copy cannot be read.
        OSError: The target cannot be written.
    """
    texts = _planned_texts(plan)
    for name, source in plan.side_files.items():
        if name not in texts:
            copy_file(source, folder / name)
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    return [*plan.side_files, *texts]


def lay_out(plan: Plan, folder: Path) -> None:
    """Write a plan's output without weights: headers, sparse files of full size, and the files besides weights.

    Args:
        plan: The plan.
        folder: The folder to write; it must not exist.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        folder.mkdir()
        for shard in plan.shards:
            with (folder / shard.name).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        write_planned_files(plan, folder)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None


def _hashed(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return names, sizes and hashes of files, as entries of the run record."""
    return [{"file": n, "bytes": (folder / n).stat().st_size, "sha256": sha256_of_file(folder / n)} for n in names]


def _tensor_digests(groups: Iterable[Group], entries: Entries) -> Digests:
    """Combine the digests of blocks into one digest per input tensor."""
    found: dict[tuple[Path, ...], dict[str, bytes]] = defaultdict(dict)
    # thousands of tensors share a path, and hashing a path takes long
    of_file: dict[int, dict[str, bytes]] = {}
    for group in groups:
        parts = [entries[group.index, segment]["in"] for segment in range(len(group.segments))]
        sources = [source for tensor in group.tensors for source in tensor.inputs]
        if group.bundle:
            # small tensors were read whole, and have their digests one after the other
            joined = bytes.fromhex(parts[0])
            each = [joined[at : at + DIGEST] for at in range(0, len(joined), DIGEST)]
        else:
            each = [tensor_digest([bytes.fromhex(text) for text in column]) for column in zip(*parts, strict=True)]
        for source, digest in zip(sources, each, strict=True):
            if source.stored:
                files, name = source.place
                found[files][name] = digest
                continue
            held = of_file.get(id(source.file))
            if held is None:
                held = of_file[id(source.file)] = found[(source.file,)]
            held[source.name] = digest
    return found
