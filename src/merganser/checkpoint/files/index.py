"""The index of a checkpoint of several files: which file holds which tensor."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from ...errors import CheckpointError
from ...jsonfile import parse_object_file, read_bytes
from ...wording import brief
from ..tensor import TensorInfo
from .weights import PICKLED_SUFFIXES

__all__ = ["check_index", "check_shard_name", "read_weight_map"]

# models of one architecture mostly have the same index, byte for byte: the latest one is kept
_parsed: dict[bytes, dict[str, str]] = {}


def read_weight_map(index: Path) -> dict[str, str]:
    """Read from an index which file holds which tensor, and check that every file is inside the index's folder.

    Raises:
        CheckpointError: the index is damaged, or one of its paths leaves the folder.
    """
    data = read_bytes(index)
    if data in _parsed:
        return _parsed[data]
    weight_map = parse_object_file(data, str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: must have a 'weight_map' from names of tensors to names of files")
    checked: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise CheckpointError(
                f"{index}: tensor {name!r}: the name of its file must be a string, found {brief(file)}"
            )
        # thousands of tensors share a file, so each file name is checked once
        if file not in checked:
            check_shard_name(index, file)
            checked.add(file)
    _parsed.clear()
    _parsed[data] = weight_map
    return weight_map


def check_shard_name(index: Path, name: str) -> None:
    """Refuse the name of a file that is not inside the folder, or is not a file of weights.

    Raises:
        CheckpointError: It is such a name.
    """
    # Parsed by Windows rules, the strictest (both slashes, drives, shares), so that it means the same on every system.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or "\0" in name or "\\" in name:
        raise CheckpointError(f"{index}: file {name!r} is not inside the checkpoint's folder, where it must be")
    if not name.endswith((".safetensors", *PICKLED_SUFFIXES)):
        raise CheckpointError(f"{index}: file {name!r} is not a file of weights")


def check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Compare an index with what the files hold.

    Raises:
        CheckpointError: A tensor is in another file, in none, or not in the index.
    """
    # thousands of tensors share a path, and comparing paths takes long, so it is done once
    held = {id(tensor.file): tensor.file for tensor in tensors.values()}
    named = set(weight_map.values())
    agreed = {(key, file) for key, path in held.items() for file in named if path == index.parent / file}
    names = dict(agreed)
    if len(names) == len(agreed) and weight_map == {name: names.get(id(t.file)) for name, t in tensors.items()}:
        return
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index}: tensor {name!r} should be in {file}, but is in no file of the index; fetch the checkpoint again"
            )
        found = tensors[name].file
        if (id(found), file) not in agreed:
            raise CheckpointError(
                f"{index}: tensor {name!r} should be in {file}, but is in {found.name}; fetch the checkpoint again"
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} is not in the index {index.name}; fetch the checkpoint again, or remove the file if it belongs to another model"
            )
