"""Read a run record back, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotFoundError, UnsupportedError
from ..jsonfile import Entry, read_object
from .format import RECORD_FORMAT, RECORD_NAME

__all__ = ["InputFile", "Moved", "Movement", "OutputFile", "Record", "Restored", "read_record"]


@dataclass(frozen=True, slots=True)
class InputFile:
    """A weight file that the merge read; `hash` is the hash of its tensors."""

    model: str
    path: str
    bytes: int
    tensors: int
    tensors_read: int
    hash: str


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file that the merge wrote."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Moved:
    """How far one tensor, a group of tensors (a layer and role), or all tensors moved; see `engine.movement`.

    Args:
        place: Place of this entry in the record, for messages.
        name: Name of the tensor; None for a group.
        layer: Number of the layer; None outside the layers, and for all tensors together.
        role: Role of the tensors; empty for all tensors together.
        tensors: Number of tensors.
        parameters: Number of elements; None if the record does not contain it.
        inputs: Names of the base (or first model) and the models, if they differ between tensors.
        models: Distance of each model from the base, over the norm of the base; empty if not measured.
        merged: Distance of the merge from the base, over the norm of the base.
        rounding: Share of each task vector that is due to rounding of the stored model; empty if not measured.
        length: Norm of the merged task vector over the root mean square norm of the models' task vectors.
        cosine: Mean cosine over all pairs of task vectors.
        sign_conflict: Among the elements that two models changed, the share that they changed in opposite directions.
        cosines: Cosine of each pair of task vectors, in the order of `itertools.combinations`.
        sign_conflicts: Sign conflict of each pair of models, in the same order.
    """

    place: str
    name: str | None
    layer: int | None
    role: str
    tensors: int
    parameters: int | None
    inputs: Sequence[str]
    models: Sequence[float]
    merged: float | None
    rounding: Sequence[float | None]
    length: float | None
    cosine: float | None
    sign_conflict: float | None
    cosines: Sequence[float | None]
    sign_conflicts: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Movement:
    """How far models and merge moved from the base, and how task vectors are related.

    Args:
        sample: Largest number of elements of a tensor on which distances were measured.
        pair_sample: Largest number of elements of a tensor on which pairs of task vectors were compared.
        inputs: Names of the base (or first model) and the models; empty if they differ between tensors.
        from_base: Whether the first input is a base; None if that differs between tensors.
        total: Movement of all tensors together.
        tensors: Movement of each tensor.
    """

    sample: int
    pair_sample: int
    inputs: Sequence[str]
    from_base: bool | None
    total: Moved
    tensors: Sequence[Moved]


@dataclass(frozen=True, slots=True)
class Restored:
    """A model that a sidecar restores: bytes of the sidecar and of the full model, relative error of the weights."""

    name: str
    model: str
    bytes: int
    full_bytes: int
    error: float | None


@dataclass(frozen=True, slots=True)
class Record:
    """A run record; attributes are named like the keys of merge.json.

    Args:
        out: The output folder.
        methods: Number of tensors that each method merged; empty in records of earlier versions.
        movement: None in records of earlier versions.
        restored: The models that the sidecar restores; empty for merges without one.
    """

    out: Path
    created: str
    versions: dict[str, str]
    recipe: str
    method: str
    methods: dict[str, int]
    seed: int | None
    compat: str | None
    donor: str
    models: Sequence[str]
    parameters: int
    tensors: int
    dtypes: Sequence[str]
    device: str
    compiled: bool
    workers: int
    continued: bool
    warnings: Sequence[str]
    differences: Sequence[str]
    inputs: Sequence[InputFile]
    outputs: Sequence[OutputFile]
    layers: Sequence[Moved]
    movement: Movement | None
    restored: Sequence[Restored]
    timings: dict[str, float]


def read_record(out: str | Path) -> Record:
    """Read the run record of an output.

    Args:
        out: Folder that a merge wrote.

    Raises:
        NotFoundError: There is no such folder, or no run record in it.
        CheckpointError: The run record is damaged.
        UnsupportedError: The run record has a later format, or is one of an adapter, or of training.
    """
    out = Path(out)
    if not out.is_dir():
        raise NotFoundError(f"{out}: {'is not a folder' if out.exists() else 'no such folder'}")
    file = out / RECORD_NAME
    if not file.exists():
        raise NotFoundError(f"{out}: has no {RECORD_NAME}; a report is drawn of what merganser merged")
    root = Entry(read_object(file), str(file))
    version = root["format"].whole()
    if version > RECORD_FORMAT:
        raise UnsupportedError(
            f"{file}: is of format {version}, and this version of merganser reads up to {RECORD_FORMAT}; install a later one"
        )
    if root.get("extracted") is not None or root.get("merged_adapters") is not None:
        raise UnsupportedError(f"{out}: holds an adapter; a report is drawn of merged models")
    if root.get("fused") is not None:
        raise UnsupportedError(f"{out}: holds a model that was trained; a report is drawn of merged models")
    return _record(out, root)


def _record(out: Path, root: Entry) -> Record:
    methods, seed, compat, movement, sidecars = (
        root.get(key) for key in ("methods", "seed", "compat", "movement", "sidecars")
    )
    return Record(
        out=out,
        created=root["created"].text(),
        versions={name: version.text() for name, version in root["versions"].items()},
        recipe=root["recipe"].text(),
        method=root["method"].text(),
        methods={} if methods is None else {name: count.whole() for name, count in methods.items()},
        seed=None if seed is None else seed.whole(),
        compat=None if compat is None else compat.text(),
        donor=root["donor"].text(),
        models=root["models"].each(Entry.text),
        parameters=root["parameters"].whole(),
        tensors=root["tensors"].whole(),
        dtypes=root["dtypes"].each(Entry.text),
        device=root["device"].text(),
        compiled=root["compiled"].flag(),
        workers=root["workers"].whole(),
        continued=root["continued"].flag(),
        warnings=root["warnings"].each(Entry.text),
        differences=root["differences_from_mergekit"].each(Entry.text),
        inputs=root["inputs"].each(_input),
        outputs=root["outputs"].each(_output),
        layers=root["layers"].each(_moved),
        movement=None if movement is None else _movement(movement),
        restored=[] if sidecars is None else sidecars["tasks"].each(_restored),
        timings={name: seconds.number() for name, seconds in root["timings"].items()},
    )


def _input(entry: Entry) -> InputFile:
    return InputFile(
        model=entry["model"].text(),
        path=entry["path"].text(),
        bytes=entry["bytes"].whole(),
        tensors=entry["tensors"].whole(),
        tensors_read=entry["tensors_read"].whole(),
        hash=entry["xxh3_128_of_tensors"].text(),
    )


def _output(entry: Entry) -> OutputFile:
    return OutputFile(entry["file"].text(), entry["bytes"].whole(), entry["sha256"].text())


def _restored(entry: Entry) -> Restored:
    return Restored(
        name=entry["name"].text(),
        model=entry["model"].text(),
        bytes=entry["bytes"].whole(),
        full_bytes=entry["full_bytes"].whole(),
        error=_number(entry, "error"),
    )


def _movement(entry: Entry) -> Movement:
    inputs, from_base = entry.get("inputs"), entry.get("from_base")
    total = _moved(entry["total"])
    if inputs is not None and total.models and len(inputs.each(Entry.text)) != len(total.models) + 1:
        inputs.refuse(f"{len(total.models) + 1} names, a base and {len(total.models)} models")
    return Movement(
        sample=entry["sample"].whole(),
        pair_sample=entry["pair_sample"].whole(),
        inputs=[] if inputs is None else inputs.each(Entry.text),
        from_base=None if from_base is None else from_base.flag(),
        total=total,
        tensors=entry["tensors"].each(_moved),
    )


def _moved(entry: Entry) -> Moved:
    name, layer, role, tensors, parameters, inputs, models = (
        entry.get(key) for key in ("name", "layer", "role", "tensors", "parameters", "inputs", "models")
    )
    distances = [] if models is None else models.each(Entry.number)
    pairs = len(distances) * (len(distances) - 1) // 2
    return Moved(
        place=entry.place,
        name=None if name is None else name.text(),
        layer=None if layer is None else layer.whole(),
        role="" if role is None else role.text(),
        tensors=1 if tensors is None else tensors.whole(),
        parameters=None if parameters is None else parameters.whole(),
        inputs=[] if inputs is None else inputs.each(Entry.text),
        models=distances,
        merged=_number(entry, "merged"),
        rounding=_of_each(entry, "rounding", len(distances), "model"),
        length=_number(entry, "length"),
        cosine=_number(entry, "cosine"),
        sign_conflict=_number(entry, "sign_conflict"),
        cosines=_of_each(entry, "cosines", pairs, "two models"),
        sign_conflicts=_of_each(entry, "sign_conflicts", pairs, "two models"),
    )


def _number(entry: Entry, key: str) -> float | None:
    value = entry.get(key)
    return None if value is None else value.number()


def _of_each(entry: Entry, key: str, count: int, of: str) -> list[float | None]:
    value = entry.get(key)
    values = [] if value is None else value.each(Entry.maybe)
    if value is not None and len(values) != count:
        value.refuse(f"a list of {count} values, one for each {of}")
    return values
