"""Adapters in peft's format, opened from their headers: LoRA (Hu et al. 2022, equation 3), DoRA, IA3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint import TensorInfo
from ..checkpoint.formats.pickled import read_pickled
from ..checkpoint.formats.safetensors import read_header
from ..checkpoint.hub import adapter_snapshot, is_hub_id
from ..errors import CheckpointError, NotFoundError, UnsupportedError
from ..jsonfile import exists
from .config import CONFIG_NAME, AdapterConfig, read_config

PREFIX = "base_model.model."
"""What peft puts before the names of the base."""

FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of an adapter's weights."""

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?")
_LENGTHS = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_SCALES = re.compile(r"(?P<module>.+)\.ia3_l(\.weight)?")


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one weight: scale * B A, and with lengths a scaling of its rows (of its outputs) to these.

    Args:
        module: Name of the module in the base model; with `.base_layer` behind it for each further parameter of the
            module that is changed, too.
        a: A, shape [r, in].
        b: B, shape [out, r].
        scale: alpha / r, or alpha / sqrt(r).
        transposed: Whether the weight is stored as [in, out]: embeddings and Conv1D layers.
        embedding: Whether it is one of an embedding, which peft stores under other names.
        lengths: Length of each output's weights (DoRA), shape [out]; None without.
        rank: r.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    embedding: bool
    lengths: TensorInfo | None
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk, known from its headers.

    Args:
        reference: The adapter as the user wrote it.
        path: Its folder.
        config: Its config.
        file: The file with its tensors.
        changes: Low-rank changes, by module.
        scaled: Factors of IA3, by module: [out, 1] for outputs, [1, in] for inputs.
        replaced: Tensors that replace those of the base (modules_to_save, biases, saved embeddings), by name in the
            base.
    """

    reference: str
    path: Path
    config: AdapterConfig
    file: Path
    changes: Mapping[str, LowRank]
    scaled: Mapping[str, TensorInfo]
    replaced: Mapping[str, TensorInfo]

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors of the file."""
        low_rank = [part for each in self.changes.values() for part in (each.a, each.b, each.lengths) if part]
        return [*low_rank, *self.scaled.values(), *self.replaced.values()]

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, the smallest first."""
        return sorted({each.rank for each in self.changes.values()})


def is_adapter(reference: str) -> bool:
    """Return whether a reference is a folder with an adapter and without a model."""
    return exists(reference) and (Path(reference).expanduser() / CONFIG_NAME).exists()


def open_adapter(reference: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Adapter:
    """Open an adapter: read its config and headers, but no weights.

    Args:
        reference: A folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), or a Hub id.
        revision: The branch, tag or commit on the Hub.
        cache_dir: Folder for adapters from the Hub.

    Raises:
        NotFoundError: There is no such folder, or a file is missing.
        CheckpointError: A file is damaged or contradicts another.
        UnsupportedError: It is of a kind that cannot be read here.
    """
    path = Path(reference).expanduser()
    if exists(reference):
        if revision is not None:
            raise CheckpointError(
                f"{reference}: revision {revision!r} is given, but the adapter is a folder on this machine"
            )
        path = path.parent if path.is_file() and path.name in (*FILES, CONFIG_NAME) else path
    elif is_hub_id(reference):
        path = adapter_snapshot(reference, (CONFIG_NAME, *FILES), revision=revision, cache_dir=cache_dir)
    if not path.is_dir():
        raise NotFoundError(
            f"adapter {reference!r} not found: no such folder; give the folder that holds its {CONFIG_NAME}, or its id on "
            "the Hub"
        )
    if not (path / CONFIG_NAME).exists():
        raise NotFoundError(f"{path}: no {CONFIG_NAME}: not an adapter of peft")
    config = read_config(path)
    file = next((path / name for name in FILES if (path / name).exists()), None)
    if file is None:
        raise NotFoundError(f"{path}: no {' and no '.join(FILES)}: the adapter's weights are missing")
    tensors = read_header(file)[0] if file.suffix == ".safetensors" else read_pickled(file)
    return _sort(
        Adapter(reference=reference, path=path, config=config, file=file, changes={}, scaled={}, replaced={}), tensors
    )


def _sort(adapter: Adapter, tensors: list[TensorInfo]) -> Adapter:
    """Sort the tensors of an adapter by what they do."""
    file = adapter.file
    factors: dict[str, dict[str, TensorInfo]] = {}
    embeddings: set[str] = set()
    lengths: dict[str, TensorInfo] = {}
    scaled: dict[str, TensorInfo] = {}
    replaced: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if not tensor.name.startswith(PREFIX):
            raise CheckpointError(f"{file}: tensor {tensor.name!r}: the names of peft begin with {PREFIX!r}")
        if tensor.dtype.kind != "float":
            raise CheckpointError(f"{file}: tensor {tensor.name!r} is {tensor.dtype.name}; float values are needed")
        name = tensor.name.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            pair = factors.setdefault(match["module"], {})
            if match["which"] in pair:
                raise CheckpointError(f"{file}: {match['module']} has {match['which']} of LoRA twice")
            pair[match["which"]] = tensor
            if match["embedding"]:
                embeddings.add(match["module"])
        elif match := _LENGTHS.fullmatch(name):
            lengths[match["module"]] = tensor
        elif match := _SCALES.fullmatch(name):
            scaled[match["module"]] = tensor
        elif "lora_" in name or "ia3_" in name:
            raise UnsupportedError(f"{file}: tensor {tensor.name!r} is neither A nor B of a LoRA layer")
        else:
            own = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".").replace(".original_module.", ".")
            if own in replaced:
                raise CheckpointError(f"{file}: holds {own} twice, as {replaced[own].name} and as {tensor.name}")
            replaced[own] = tensor
    if not factors and not replaced and not scaled:
        raise CheckpointError(f"{file}: holds no tensors")
    _check_kind(adapter, factors, lengths, scaled)
    return replace(adapter, changes=_changes(adapter, factors, lengths, embeddings), scaled=scaled, replaced=replaced)


def _check_kind(
    adapter: Adapter,
    factors: Mapping[str, Mapping[str, TensorInfo]],
    lengths: Mapping[str, TensorInfo],
    scaled: Mapping[str, TensorInfo],
) -> None:
    """Refuse tensors that the config does not speak of, or that are not where it speaks of them."""
    file, config = adapter.file, adapter.config
    odd = next(iter(factors if config.kind == "IA3" else scaled), None)
    if odd is not None:
        kind = "LoRA" if config.kind == "IA3" else "IA3"
        raise CheckpointError(f"{file}: {odd} has tensors of {kind}, and by its config the adapter is {config.text}")
    for module, tensor in scaled.items():
        if len(tensor.shape) != 2 or 1 not in tensor.shape:
            raise UnsupportedError(
                f"{file}: {module}: its factors are {list(tensor.shape)}; one per input or output is known"
            )
    if config.kind == "IA3":
        return
    for module, pair in factors.items():
        _check_pair(file, module, pair)
        if config.dora and module not in lengths:
            raise CheckpointError(f"{file}: {module} has no lora_magnitude_vector, and use_dora is true")
    for module, tensor in lengths.items():
        if not config.dora or module not in factors:
            why = "no A and B" if config.dora else "use_dora is false"
            raise CheckpointError(f"{file}: {module} has a lora_magnitude_vector, and {why}")
        out = factors[module]["B"].shape[0]
        if tensor.numel != out:
            raise CheckpointError(f"{file}: {module} has {tensor.numel} lengths and {out} outputs")


def _changes(
    adapter: Adapter,
    factors: Mapping[str, Mapping[str, TensorInfo]],
    lengths: Mapping[str, TensorInfo],
    embeddings: set[str],
) -> dict[str, LowRank]:
    config = adapter.config
    if config.kind == "IA3":
        return {}
    scales = config.scales({module: pair["A"].shape[0] for module, pair in factors.items()})
    ranks = config.ranks([*factors])
    return {
        module: LowRank(
            module=module,
            a=pair["A"],
            b=pair["B"],
            scale=scales[module],
            transposed=module in embeddings or config.transposed,
            embedding=module in embeddings,
            lengths=lengths.get(module),
            rank=int(ranks[module]),
        )
        for module, pair in factors.items()
    }


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
    if 0 in (*a.shape, *b.shape):
        raise CheckpointError(
            f"{file}: {module}: A is {list(a.shape)} and B is {list(b.shape)}: empty, as saved by a run that was not "
            "gathered from its shards"
        )
