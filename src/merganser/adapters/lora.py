"""LoRA adapters in peft's format: W + scale * B A (Hu et al. 2022, LoRA, equation 3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import Reader, TensorInfo
from ..checkpoint.formats.pickled import read_pickled
from ..checkpoint.formats.safetensors import read_header
from ..errors import CheckpointError, NotFoundError, UnsupportedError
from .config import CONFIG_NAME, LoraConfig, read_config

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?")
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one weight: scale * B A.

    Args:
        a: A, shape [r, in].
        b: B, shape [out, r].
        scale: alpha / r, or alpha / sqrt(r).
        transposed: Whether the weight is stored as [in, out]: embeddings and Conv1D layers.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk, known from its headers.

    Args:
        path: Its folder.
        config: Its config.
        file: The file with its tensors.
        changes: Low-rank changes, by the name of the weight in the base.
        replaced: Tensors that replace those of the base (modules_to_save, resized embeddings), by name in the base.
    """

    path: Path
    config: LoraConfig
    file: Path
    changes: Mapping[str, LowRank]
    replaced: Mapping[str, TensorInfo]

    def check_fits(self, tensors: Mapping[str, TensorInfo], model: str) -> None:
        """Check that a checkpoint has the tensors that the adapter changes, in the same shapes.

        Args:
            tensors: Tensors of the checkpoint.
            model: Name of the checkpoint in messages.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """
        wanted = {name: change.shape for name, change in self.changes.items()}
        wanted |= {name: tensor.shape for name, tensor in self.replaced.items()}
        missing = [name for name in wanted if name not in tensors]
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            tied = "; it is tied to the embeddings there" if "lm_head.weight" in missing else ""
            raise CheckpointError(
                f"{self.file}: changes {missing[0]}{more}, not found in {model}{tied}; is it an adapter of another model?"
            )
        for name, shape in wanted.items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{self.file}: {name} is {list(shape)} here and {list(tensors[name].shape)} in {model}; "
                    "is it an adapter of another model?"
                )

    def touches(self, name: str) -> bool:
        """Return whether the adapter changes a tensor of the base."""
        return name in self.changes or name in self.replaced

    def apply(self, name: str, weight: Tensor, reader: Reader) -> Tensor:
        """Return a tensor of the base with the adapter applied.

        Args:
            name: Its name.
            weight: Its value, any float dtype, on the CPU.
            reader: Reader for the tensors of the adapter.

        Returns:
            W + scale * B A in float32 (float64 if an operand is float64), not rounded to the dtype of the base; the
            tensor itself if the adapter does not change it.
        """
        import torch

        if name in self.replaced:
            weight = reader.tensor(self.replaced[name])
        change = self.changes.get(name)
        if change is None:
            return weight
        a, b = reader.tensor(change.a), reader.tensor(change.b)
        wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype, b.dtype) else torch.float32
        delta = change.scale * (b.to(wide) @ a.to(wide))
        return weight.to(wide) + (delta.T if change.transposed else delta)


def open_adapter(reference: str) -> Adapter:
    """Open an adapter: read its config and headers, but no weights.

    Args:
        reference: A folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Raises:
        NotFoundError: There is no such folder, or a file is missing.
        CheckpointError: A file is damaged or contradicts another.
        UnsupportedError: It is not plain LoRA: DoRA, biases, an initialisation that changes the base, convolutions.
    """
    path = Path(reference).expanduser()
    if not path.is_dir():
        raise NotFoundError(
            f"adapter {reference!r} not found: no such folder; give the folder that holds its {CONFIG_NAME} "
            "(from the Hub: hf download ORG/NAME --local-dir FOLDER)"
        )
    if not (path / CONFIG_NAME).exists():
        raise NotFoundError(f"{path}: no {CONFIG_NAME}: not an adapter of peft")
    config = read_config(path)
    file = next((path / name for name in _FILES if (path / name).exists()), None)
    if file is None:
        raise NotFoundError(f"{path}: no {' and no '.join(_FILES)}: the adapter's weights are missing")
    tensors = read_header(file)[0] if file.suffix == ".safetensors" else read_pickled(file)
    changes, replaced = _sort(config, file, tensors)
    return Adapter(path, config, file, changes, replaced)


def _sort(
    config: LoraConfig, file: Path, tensors: list[TensorInfo]
) -> tuple[dict[str, LowRank], dict[str, TensorInfo]]:
    """Sort the tensors of an adapter into low-rank changes and replaced tensors, by name in the base."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    embeddings: set[str] = set()
    replaced: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if not tensor.name.startswith(_PREFIX):
            raise CheckpointError(f"{file}: tensor {tensor.name!r}: the names of peft begin with {_PREFIX!r}")
        if tensor.dtype.kind != "float":
            raise CheckpointError(f"{file}: tensor {tensor.name!r} is {tensor.dtype.name}; float values are needed")
        name = tensor.name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match["module"], {})[match["which"]] = tensor
            if match["embedding"]:
                embeddings.add(match["module"])
        elif "lora_" in name:
            raise UnsupportedError(f"{file}: tensor {tensor.name!r} is neither A nor B of a LoRA layer")
        else:
            replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    if not factors and not replaced:
        raise CheckpointError(f"{file}: holds no tensors")
    for module, pair in factors.items():
        _check_pair(file, module, pair)
    scales = config.scales({module: pair["A"].shape[0] for module, pair in factors.items()})
    changes = {
        f"{module}.weight": LowRank(pair["A"], pair["B"], scales[module], module in embeddings or config.transposed)
        for module, pair in factors.items()
    }
    return changes, replaced


def _check_pair(file: Path, module: str, pair: Mapping[str, TensorInfo]) -> None:
    if len(pair) != 2:
        raise CheckpointError(f"{file}: {module} has {next(iter(pair))} of LoRA alone; A and B are needed")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UnsupportedError(
            f"{file}: {module}: A and B are {list(a.shape)} and {list(b.shape)}; matrices can be read"
        )
    if a.shape[0] != b.shape[1]:
        raise CheckpointError(f"{file}: {module}: A is {list(a.shape)} and B is {list(b.shape)}; their ranks differ")
