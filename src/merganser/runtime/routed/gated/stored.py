"""Gates as a file: their settings and weights, and the parts where those are smaller than what the tasks have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ....errors import CheckpointError, NotFoundError, ParameterError, UnsupportedError
from .parts import Part
from .routing import Gates
from .settings import GateSettings

__all__ = ["GATES_FILE", "StoredGates", "gates_to_bytes", "read_gates"]

GATES_FILE = "gates.safetensors"
FORMAT = "1"
_AGAIN = "make the gates again"


@dataclass(frozen=True)
class StoredGates:
    """Gates that were read.

    Args:
        tasks: Names of the tasks.
        settings: Their settings.
        gates: Their weights.
        parts: The parts by layer; None where they are read from the tasks.
        shared: Hash of the shared model.
        base: What the shared model was called when they were made.
    """

    tasks: tuple[str, ...]
    settings: GateSettings
    gates: Gates
    parts: Mapping[str, Part] | None
    shared: str
    base: str


def gates_to_bytes(found: StoredGates) -> bytes:
    """Return gates as a file of safetensors."""
    tensors: dict[str, Tensor] = {}
    for key, weight in found.gates.weights.items():
        tensors[f"gate/{key}/weight"] = weight.detach().cpu().contiguous()
        tensors[f"gate/{key}/bias"] = found.gates.biases[key].detach().cpu().contiguous()
    for layer, part in (found.parts or {}).items():
        tensors |= {f"part/{layer}/{name}": tensor.cpu() for name, tensor in part.tensors().items()}
    metadata = {
        "format": FORMAT,
        "kind": "gates",
        "tasks": json.dumps(found.tasks),
        "settings": found.settings.to_json(),
        "shared": found.shared,
        "base": found.base,
        "parts": "stored" if found.parts is not None else "of the tasks",
    }
    return save(tensors, metadata)


def read_gates(path: Path) -> StoredGates:
    """Read gates.

    Raises:
        NotFoundError: There is no such file.
        UnsupportedError: It is of a later version.
        CheckpointError: It is damaged, or holds no gates.
    """
    if not path.exists():
        raise NotFoundError(
            f"{path}: no such gates; make them from text: merganser route OUT --gates KIND --data TASK=FILE ..."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != "gates":
                raise CheckpointError(f"{path}: holds no gates; {_AGAIN}")
            if metadata.get("format") != FORMAT:
                raise UnsupportedError(
                    f"{path}: format {metadata.get('format')} is of a later version; this one reads {FORMAT}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tasks = tuple(json.loads(metadata["tasks"]))
        settings = GateSettings.from_json(metadata["settings"])
        gates, parts = _sorted(tensors, len(tasks))
        stored = metadata["parts"] == "stored"
        return StoredGates(tasks, settings, gates, parts if stored else None, metadata["shared"], metadata["base"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, ParameterError) as error:
        raise CheckpointError(f"{path}: is damaged, or holds no gates: {error}; {_AGAIN}") from None


def _sorted(tensors: Mapping[str, Tensor], tasks: int) -> tuple[Gates, dict[str, Part]]:
    gates = Gates()
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        owner, _, leaf = rest.rpartition("/")
        if kind == "part":
            parts.setdefault(owner, {})[leaf] = tensor
            continue
        if not tensor.isfinite().all():
            raise ValueError(f"{name} contains NaN or infinity")
        (gates.weights if leaf == "weight" else gates.biases)[owner] = tensor
    return gates, {layer: Part.from_tensors(tasks, own) for layer, own in parts.items()}


def fits(found: StoredGates, tasks: Sequence[str], shared: str, widths: Mapping[str, int], path: Path) -> None:
    """Check that gates belong to tasks and a shared model.

    Args:
        found: The gates.
        tasks: The tasks.
        shared: Hash of the shared model.
        widths: How many features each gate must read, by name.
        path: Where the gates were read.

    Raises:
        CheckpointError: They belong to others.
    """
    if found.tasks != tuple(tasks):
        raise CheckpointError(
            f"{path}: is for the tasks {', '.join(found.tasks)}, there are {', '.join(tasks)}; {_AGAIN}"
        )
    if found.shared != shared:
        raise CheckpointError(f"{path}: was made for another shared model; {_AGAIN}")
    wanted = {key: (len(tasks), width) for key, width in widths.items()}
    shapes = {key: tuple(weight.shape) for key, weight in found.gates.weights.items()}
    if shapes != wanted or any(tuple(bias.shape) != (len(tasks),) for bias in found.gates.biases.values()):
        odd = min(
            (key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key)), default="a bias"
        )
        raise CheckpointError(f"{path}: the gate of {odd} does not fit the layers that have parts or experts; {_AGAIN}")
    if found.gates.biases.keys() != wanted.keys():
        raise CheckpointError(f"{path}: gates without biases; {_AGAIN}")
