"""A mixture as a file beside its experts: settings, router and projections; embeddings and layers are the experts'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ....errors import CheckpointError, NotFoundError, ParameterError, UnsupportedError
from .settings import KIND, MixtureSettings

__all__ = ["StoredMixture", "fits", "is_mixture", "mixture_to_bytes", "read_mixture"]

FORMAT = "1"
_AGAIN = f"make it again: merganser route FOLDER --gates {KIND} --data TASK=FILE ..."


@dataclass(frozen=True)
class StoredMixture:
    """A mixture that was read.

    Args:
        tasks: Names of the experts.
        hashes: Their hashes.
        settings: How they are mixed.
        tensors: "router/weight" and "router/bias" of a router; "into/NAME" and "out/NAME" of projections.
    """

    tasks: tuple[str, ...]
    hashes: tuple[str, ...]
    settings: MixtureSettings
    tensors: Mapping[str, Tensor]


def mixture_to_bytes(found: StoredMixture) -> bytes:
    """Return a mixture as a file of safetensors."""
    metadata = {
        "format": FORMAT,
        "kind": KIND,
        "tasks": json.dumps(found.tasks),
        "shared": json.dumps(found.hashes),
        "settings": found.settings.to_json(),
    }
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in found.tensors.items()}, metadata)


def is_mixture(path: Path) -> bool:
    """Return whether a file of gates holds a mixture of unequal experts; False if there is none.

    Raises:
        CheckpointError: It cannot be read.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("kind") == KIND
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged, or holds no gates: {error}; make the gates again") from None


def read_mixture(path: Path) -> StoredMixture:
    """Read a mixture.

    Raises:
        NotFoundError: There is no such file.
        UnsupportedError: It is of a later version.
        CheckpointError: It is damaged, or holds no mixture.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such mixture; {_AGAIN.replace('it again', 'it from text')}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise CheckpointError(f"{path}: holds no mixture of unequal experts; {_AGAIN}")
            if metadata.get("format") != FORMAT:
                raise UnsupportedError(
                    f"{path}: format {metadata.get('format')} is of a later version; this one reads {FORMAT}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if odd := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
            raise ValueError(f"{odd} contains NaN or infinity")
        return StoredMixture(
            tuple(json.loads(metadata["tasks"])),
            tuple(json.loads(metadata["shared"])),
            MixtureSettings.from_json(metadata["settings"]),
            tensors,
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, ParameterError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is damaged, or holds no mixture: {error}; {_AGAIN}") from None


def fits(
    found: StoredMixture, tasks: Sequence[str], hashes: Sequence[str], shapes: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Check that a mixture belongs to experts.

    Args:
        found: The mixture.
        tasks: Names of the experts.
        hashes: Their hashes.
        shapes: Of the tensors that it must have.
        path: Where it was read.

    Raises:
        CheckpointError: It belongs to others.
    """
    if found.tasks != tuple(tasks):
        raise CheckpointError(
            f"{path}: is for the experts {', '.join(map(str, found.tasks))}, there are {', '.join(tasks)}; {_AGAIN}"
        )
    if found.hashes != tuple(hashes):
        other = next((task for task, a, b in zip(tasks, found.hashes, hashes, strict=False) if a != b), tasks[-1])
        raise CheckpointError(f"{path}: was made for another model {other!r}; {_AGAIN}")
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    there = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    if odd := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
        raise CheckpointError(
            f"{path}: {odd[0]} is {_shape(there.get(odd[0]))}, must be {_shape(wanted.get(odd[0]))}; {_AGAIN}"
        )
    if odd := [name for name, tensor in found.tensors.items() if tensor.dtype != torch.float32]:
        raise CheckpointError(f"{path}: {odd[0]} is {found.tensors[odd[0]].dtype}, must be float32; {_AGAIN}")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
