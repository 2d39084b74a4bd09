"""Describe a checkpoint from its headers and config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters import open_adapter, open_reference
from ..anatomy import Anatomy, infer_anatomy, is_tied
from ..anatomy.sizes import size_warnings
from ..checkpoint import Checkpoint, TensorInfo
from ..checkpoint.files.weights import PICKLED_SUFFIXES, TRAINER_SUFFIX
from ..errors import suggest_keywords
from ..wording import some

__all__ = [
    "InspectedAdapter",
    "InspectedFile",
    "InspectedTensor",
    "Inspection",
    "Share",
    "inspect",
    "inspect_adapter",
    "open_reference",
]

_WEIGHTS = ("float", "quantised")


@dataclass(frozen=True, slots=True)
class InspectedFile:
    """A weight file: its name, its size in bytes, and the number of tensors in it."""

    file: str
    bytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """A tensor: its name, dtype, shape, file, layer and role; `layer` is None outside the layers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    layer: int | None
    role: str


@dataclass(frozen=True, slots=True)
class Share:
    """Number of tensors of one kind (a dtype or a role), and of their elements."""

    tensors: int
    parameters: int


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """Description of an adapter.

    Args:
        path: Its folder.
        kind: LoRA, rsLoRA, DoRA or IA3.
        base: The base that its config names; None if it names none.
        ranks: The ranks that occur, the smallest first; empty for IA3.
        low_rank: Number of weights with a low-rank change.
        scaled: Number of weights whose rows or columns are multiplied (IA3).
        replaced: Names of tensors that replace those of the base.
        modules: Number of changed weights by the last part of the module's name.
        bytes: Bytes of its tensors.
        parameters: Number of elements of its tensors.
        dtypes: Dtypes of its tensors.
    """

    path: Path
    kind: str
    base: str | None
    ranks: Sequence[int]
    low_rank: int
    scaled: int
    replaced: Sequence[str]
    modules: Mapping[str, int]
    bytes: int
    parameters: int
    dtypes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Description of a checkpoint.

    Args:
        reference: The folder, file or Hub id as given.
        path: The local folder.
        architecture: First entry of `architectures` in config.json, or its `model_type`; None without them.
        files: Weight files.
        side_files: Tokenizer, templates and other files that a merge would copy to its output.
        bytes: Bytes of all tensors.
        parameters: Number of weights; integer buffers are not counted.
        dtypes: Tensors and elements of each dtype, the largest first.
        roles: Tensors and elements of each role, the largest first.
        layers: Number of layers of the main stack; 0 without one.
        stacks: Number of layers of each stack, by the prefix of its tensor names.
        tied: Pairs of names: one that is missing in the files because it is tied, and the tensor that it is tied to.
        vocabulary: Rows of the input embedding; None if none was recognised.
        quantised: Evidence that the weights are quantised; None if they are not.
        warnings: What a user of this checkpoint should know.
        tensors: Every tensor, in the order of the files.
        adapter: The adapter on top; None without one.
    """

    reference: str
    path: Path
    architecture: str | None
    files: Sequence[InspectedFile]
    side_files: Sequence[str]
    bytes: int
    parameters: int
    dtypes: Mapping[str, Share]
    roles: Mapping[str, Share]
    layers: int
    stacks: Mapping[str, int]
    tied: Sequence[tuple[str, str]]
    vocabulary: int | None
    quantised: str | None
    warnings: Sequence[str]
    tensors: Sequence[InspectedTensor]
    adapter: InspectedAdapter | None


def inspect_adapter(
    adapter: str | Path, *, revision: str | None = None, cache_dir: Path | None = None
) -> InspectedAdapter:
    """Describe an adapter from its config and headers; no weights are read.

    Args:
        adapter: Its folder, or its id on the Hub.
        revision: Its revision on the Hub.
        cache_dir: Folder for files from the Hub.

    Raises:
        NotFoundError: There is no such adapter.
        CheckpointError: It is damaged.
        UnsupportedError: It is of a kind that cannot be read here.
    """
    opened = open_adapter(str(adapter), revision=revision, cache_dir=cache_dir)
    changed = [name.removesuffix(".base_layer") for name in (*opened.changes, *opened.scaled)]
    return InspectedAdapter(
        path=opened.path,
        kind=opened.config.text,
        base=opened.config.base,
        ranks=opened.ranks,
        low_rank=len(opened.changes),
        scaled=len(opened.scaled),
        replaced=list(opened.replaced),
        modules=dict(Counter(name.rpartition(".")[2] for name in changed).most_common()),
        bytes=sum(tensor.nbytes for tensor in opened.tensors),
        parameters=sum(tensor.numel for tensor in opened.tensors),
        dtypes=list(dict.fromkeys(tensor.dtype.name for tensor in opened.tensors)),
    )


@suggest_keywords
def inspect(checkpoint: str | Path, *, cache_dir: Path | None = None, stream: bool = False) -> Inspection:
    """Describe a checkpoint from its headers; no weights are read.

    Args:
        checkpoint: A folder, a weight file, or the id of a model on the Hub (`org/name@revision`); with `+ADAPTER`
            after it, the model with this adapter.
        cache_dir: Folder for models from the Hub.
        stream: Leave the weights of a model from the Hub there: only the headers of its files are fetched.

    Raises:
        NotFoundError: There is no such model.
        CheckpointError: It is damaged.
        UnsupportedError: Its weights cannot be read by ranges.
        UnreachableError: The Hub stopped answering.
    """
    opened = open_reference(str(checkpoint), cache_dir=cache_dir, stream=stream)
    anatomy = infer_anatomy({name: tensor.shape for name, tensor in opened.tensors.items()}, opened.config)
    tensors = [_inspected(opened, anatomy, tensor) for tensor in opened.tensors.values()]
    held = Counter(tensor.file for tensor in opened.tensors.values())
    return Inspection(
        reference=opened.reference,
        path=opened.path,
        architecture=_architecture(opened),
        files=[InspectedFile(_name(opened, f), _size(opened, f), held[f]) for f in opened.weight_files],
        side_files=[path.relative_to(opened.path).as_posix() for path in opened.side_files],
        bytes=opened.nbytes,
        parameters=sum(tensor.numel for tensor in opened.tensors.values() if tensor.dtype.kind in _WEIGHTS),
        dtypes=_shares(
            opened, {name: (tensor.natural or tensor.dtype).name for name, tensor in opened.tensors.items()}
        ),
        roles=_shares(opened, {name: part.role for name, part in anatomy.parts.items()}),
        layers=anatomy.n_layers,
        stacks=dict(anatomy.stacks),
        tied=list(anatomy.tied),
        vocabulary=anatomy.vocab_size,
        quantised=opened.quantised,
        warnings=[*opened.notes, *_warnings(opened, anatomy)],
        tensors=tensors,
        adapter=inspect_adapter(opened.adapter[0].parent) if opened.adapter else None,
    )


def _size(checkpoint: Checkpoint, file: Path) -> int:
    remote = checkpoint.remote.get(file)
    return file.stat().st_size if remote is None else remote.size


def _name(checkpoint: Checkpoint, file: Path) -> str:
    if file in checkpoint.adapter:
        return f"{file.parent.name}/{file.name}"
    inside = file.is_relative_to(checkpoint.path)
    return file.relative_to(checkpoint.path).as_posix() if inside else file.name


def _inspected(checkpoint: Checkpoint, anatomy: Anatomy, tensor: TensorInfo) -> InspectedTensor:
    part = anatomy.parts[tensor.name]
    return InspectedTensor(
        tensor.name, tensor.dtype.name, tensor.shape, _name(checkpoint, tensor.file), part.layer, part.role
    )


def _architecture(checkpoint: Checkpoint) -> str | None:
    named = checkpoint.config.get("architectures")
    found = named[0] if isinstance(named, list) and named else checkpoint.config.get("model_type")
    return found if isinstance(found, str) else None


def _shares(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> dict[str, Share]:
    """Count tensors and elements by kind, the largest first."""
    tensors: Counter[str] = Counter(kinds.values())
    elements: Counter[str] = Counter()
    for name, kind in kinds.items():
        elements[kind] += checkpoint.tensors[name].numel
    return {kind: Share(tensors[kind], count) for kind, count in sorted(elements.items(), key=lambda e: (-e[1], e[0]))}


def _warnings(checkpoint: Checkpoint, anatomy: Anatomy) -> list[str]:
    warnings = []
    found = checkpoint.quantisation
    if found is not None:
        how = f"are dequantised when they are read: {some(found.schemes, 4)}"
        how = how if found.unreadable is None else f"cannot be merged: {found.unreadable}"
        warnings.append(f"its weights are quantised ({found.evidence}), and {how}")
    if checkpoint.unread:
        warnings.append(f"{some(checkpoint.unread)} may also hold weights and is not read")
    if not checkpoint.config:
        warnings.append(
            "there is no config.json; layers and ties are inferred from names alone, and an output has none"
        )
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    warnings += size_warnings(checkpoint.config, anatomy, shapes)
    if is_tied(checkpoint.config) and anatomy.head is not None:
        warnings.append(f"config.json says that the head is tied, and the files hold {anatomy.head}")
    endings = (*PICKLED_SUFFIXES, TRAINER_SUFFIX)
    pickled = [path.name for path in checkpoint.weight_files if path.suffix in endings]
    if pickled:
        warnings.append(f"{', '.join(pickled)}: a pickle; it is read without running code, and slower than safetensors")
    code = [path.name for path in checkpoint.side_files if path.suffix == ".py"]
    if code:
        warnings.append(f"{', '.join(code)}: code that comes with the model; merganser never runs it")
    return warnings
