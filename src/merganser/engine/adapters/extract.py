"""Extract an adapter from a fine-tune: low-rank factors of what it changed in its base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...adapters import open_reference
from ...anatomy import Anatomy, infer_anatomy, is_tied
from ...checkpoint import Checkpoint, Reader, TensorInfo
from ...errors import CheckpointError, NonFiniteError, OutputError, UnsupportedError
from ...ops.linalg.factors import factor
from ...ops.linalg.spectral import svd
from ...process import one_thread
from ...version import __version__
from ...wording import plural, some
from ..output.staging import lies_in, resolve_target
from .writing import TRANSPOSED, Spool, config_on, low_rank_names, norm_of, write_adapter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Extracted", "extract"]

Progress = Callable[[int, int], None]
Choice = Literal["save", "low-rank", "drop"]

_TABLES = ("embedding", "head", "position")
_PIECE = 1 << 19


@dataclass(frozen=True, slots=True)
class Extracted:
    """The result of `extract`.

    Args:
        out: The folder that was written.
        record: Its record, as in its `merge.json`.
    """

    out: Path
    record: Mapping[str, Any]


def extract(
    finetune: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    embeddings: Choice = "save",
    others: Literal["save", "drop"] = "save",
    dtype: str = "float32",
    overwrite: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Write an adapter with the best low-rank approximation of what a fine-tune changed in its base.

    Weight matrices are factored by a truncated singular value decomposition. Tensors are read one at a time.

    Args:
        finetune: The fine-tuned model: a folder, a file or a Hub id.
        base: Its base.
        out: Target folder; it appears when it is complete.
        rank: Rank of every factored matrix.
        energy: Instead of a rank, the share of every change's squared norm to keep, above 0 and at most 1; each matrix
            gets the smallest rank that keeps it.
        embeddings: What to do with changed embeddings and heads: store them whole ("save", as modules_to_save), factor
            them like other matrices, or leave the base's.
        others: What to do with all other changed tensors, such as norms and biases.
        dtype: Dtype of the factors.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        cache_dir: Folder for models from the Hub.
        progress: Called with the bytes read so far, and the total.

    Returns:
        The folder and its record, with the error that the adapter leaves.

    Raises:
        CheckpointError: The models do not hold the same tensors, are damaged, or do not differ.
        NonFiniteError: One of them holds NaN or infinity.
        OutputError: The target exists, or cannot be written.
        UnsupportedError: A changed tensor cannot be part of an adapter.
        ValueError: Neither or both of rank and energy are given, or one is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give a rank or an energy, not both" if rank is not None else "give a rank or an energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ValueError(f"a rank is at least 1 and an energy above 0 and at most 1, got {rank or energy}")
    tuned, origin = (open_reference(str(each), cache_dir=cache_dir) for each in (finetune, base))
    _refuse_inputs(Path(out), [tuned, origin])
    _check_alike(tuned, origin)
    with Spool(Path(out), overwrite=overwrite) as spool, Reader() as reader, one_thread():
        work = _Work(
            tuned=tuned,
            base=origin,
            rank=rank,
            energy=energy,
            embeddings=embeddings,
            others=others,
            dtype=dtype,
            spool=spool,
            reader=reader,
        )
        total = tuned.nbytes + origin.nbytes
        done = 0
        for name, tensor in tuned.tensors.items():
            work.add(name)
            done += tensor.nbytes_stored + origin.tensors[name].nbytes_stored
            if progress:
                progress(done, total)
        work.add_tied_head()
        spool.add_biases(work.biases, work.ranks)
        return _finish(work, str(finetune), str(base), overwrite)


@dataclass
class _Work:
    """What was found out so far."""

    tuned: Checkpoint
    base: Checkpoint
    rank: int | None
    energy: float | None
    embeddings: Choice
    others: Literal["save", "drop"]
    dtype: str
    spool: Spool
    reader: Reader
    ranks: dict[str, int] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    unchanged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        shapes = {name: tensor.shape for name, tensor in self.base.tensors.items()}
        self.anatomy: Anatomy = infer_anatomy(shapes, self.base.config)
        self.transposed = self.base.config.get("model_type") in TRANSPOSED

    def add(self, name: str) -> None:
        """Compare one tensor with the base's, and store what changed."""
        tuned, base = self.tuned.tensors[name], self.base.tensors[name]
        role = self.anatomy.parts[name].role
        if tuned.dtype.kind != "float":
            if self._differ(tuned, base):
                raise UnsupportedError(
                    f"{name}: whole numbers that differ from the base's cannot be part of an adapter"
                )
            return
        matrix = len(tuned.shape) == 2 and name.endswith(".weight") and role != "norm"
        if not self._differ(tuned, base):
            self.unchanged.add(name)
        elif matrix and (role not in _TABLES or (self.embeddings == "low-rank" and role != "position")):
            self._factor(name, embedding=role == "embedding")
        elif len(tuned.shape) > 2 and self.others == "save":
            raise UnsupportedError(
                f"{name}: is {list(tuned.shape)} and differs from the base's; only matrices can be factored. "
                "With --others drop it stays as in the base"
            )
        else:
            self._keep(name, self.embeddings if role in _TABLES else self.others)

    def add_tied_head(self) -> None:
        """Store the head that is tied to embeddings that were stored: peft would leave it as in the base."""
        found = [entry["tensor"] for entry in self.tensors if entry["kept"] != "dropped"]
        tied = {alias: source for alias, source in self.anatomy.tied if source in found and not is_stored(alias, self)}
        for alias, source in tied.items():
            module = alias.removesuffix(".weight")
            if source.removesuffix(".weight") in self.saved:
                self.spool.add(f"base_model.model.{alias}", self._read(self.tuned.tensors[source]))
                self.saved.append(module)
            else:
                self._factor(source, embedding=False, module=module)

    def _differ(self, first: TensorInfo, second: TensorInfo) -> bool:
        import torch

        if first.dtype.kind != "float":
            return not torch.equal(self._read(first), self._read(second))
        size = first.numel
        for start in range(0, size, _PIECE):
            pieces = [self._piece(tensor, start, min(start + _PIECE, size)) for tensor in (first, second)]
            if not torch.equal(*pieces):
                return True
        return False

    def _piece(self, tensor: TensorInfo, start: int, end: int) -> Tensor:
        import torch

        memory = torch.empty((end - start) * tensor.dtype.itemsize, dtype=torch.uint8)
        self.reader.read_into(tensor, start * tensor.dtype.itemsize, memory.numpy().data)
        return memory.view(getattr(torch, tensor.dtype.name)).to(torch.float64)

    def _read(self, tensor: TensorInfo) -> Tensor:
        return self.reader.tensor(tensor)

    def _delta(self, name: str) -> Tensor:
        """Return what changed, in float32, or float64 if one of the models is."""
        import torch

        tuned, base = (self._read(each.tensors[name]) for each in (self.tuned, self.base))
        wide = torch.float64 if torch.float64 in (tuned.dtype, base.dtype) else torch.float32
        delta = tuned.to(wide).sub_(base.to(wide))
        if not torch.isfinite(delta).all():
            raise NonFiniteError(f"{name}: one of the models holds NaN or infinity there")
        return delta

    def _factor(self, name: str, *, embedding: bool, module: str | None = None) -> None:
        """Factor what changed in a matrix."""
        import torch

        delta = self._delta(name)
        if embedding or self.transposed:
            delta = delta.T
        norm = norm_of(delta)
        rank = self.rank if self.rank is not None else self._rank_for_energy(delta, norm)
        kept = min(rank, *delta.shape)
        left, right = factor(delta, kept)
        padding = (0, rank - kept)
        dtype = getattr(torch, self.dtype)
        left, right = (torch.nn.functional.pad(part, padding).to(dtype) for part in (left, right))
        rest = delta.sub_(left.to(delta.dtype) @ right.to(delta.dtype).T)
        error = norm_of(rest)
        module = module or name.removesuffix(".weight")
        a, b = low_rank_names(module, embedding=embedding)
        self.spool.add(a, right.T)
        self.spool.add(b, left)
        self.ranks[module] = rank
        if module == name.removesuffix(".weight"):
            self._note(name, "factored", norm, error, rank)

    def _rank_for_energy(self, delta: Tensor, norm: float) -> int:
        assert self.energy is not None
        squares = svd(delta).values.square().cumsum(0)
        enough = (squares >= self.energy * norm**2 * (1 - 1e-9)).nonzero()
        return int(enough[0]) + 1 if len(enough) else max(1, len(squares))

    def _keep(self, name: str, choice: str) -> None:
        """Store a changed tensor whole, or leave the base's."""
        norm = norm_of(self._delta(name))
        module, _, last = name.rpartition(".")
        if choice == "drop" or (choice == "low-rank" and last != "weight"):
            self._note(name, "dropped", norm, norm, None)
            return
        value = self._read(self.tuned.tensors[name])
        if (
            last == "bias"
            and f"{module}.weight" in self.tuned.tensors
            and len(self.tuned.tensors[f"{module}.weight"].shape) == 2
        ):
            self.biases[module] = value
        elif last in ("weight", "bias"):
            self.spool.add(f"base_model.model.{name}", value)
            if module not in self.saved:
                self.saved.append(module)
        else:
            raise UnsupportedError(
                f"{name}: differs from the base's. It is not the weight or bias of a module, and an adapter holds nothing "
                "else; with --others drop it stays as in the base"
            )
        self._note(name, "saved", norm, 0.0, None)

    def _note(self, name: str, kept: str, norm: float, error: float, rank: int | None) -> None:
        entry: dict[str, Any] = {"tensor": name, "kept": kept, "norm": norm, "error": error}
        self.tensors.append(entry if rank is None else {**entry, "rank": rank})


def is_stored(name: str, work: _Work) -> bool:
    """Return whether the models store a tensor under this name."""
    return name in work.tuned.tensors


def _finish(work: _Work, finetune: str, base: str, overwrite: bool) -> Extracted:
    if not work.tensors:
        raise CheckpointError(f"{finetune} and {base} hold the same values; there is nothing to extract")
    if not work.ranks:
        raise CheckpointError(
            f"{finetune}: no matrix differs from {base}, only {some([entry['tensor'] for entry in work.tensors])}; an "
            "adapter without factors cannot be loaded"
        )
    total = math.sqrt(sum(entry["norm"] ** 2 for entry in work.tensors))
    left = math.sqrt(sum(entry["error"] ** 2 for entry in work.tensors))
    config = config_on(
        work.base,
        _base_name(work.base, base),
        work.ranks,
        saved=work.saved,
        biases=bool(work.biases),
        transposed=work.transposed,
    )
    kept = {kind: [e for e in work.tensors if e["kept"] == kind] for kind in ("factored", "saved", "dropped")}
    extracted = {
        "from": finetune,
        "base": base,
        "rank": work.rank,
        "energy": work.energy,
        "ranks": sorted(set(work.ranks.values())),
        "error": left / total if total else 0.0,
        "factored": len(kept["factored"]),
        "saved": [entry["tensor"] for entry in kept["saved"]],
        "dropped": [entry["tensor"] for entry in kept["dropped"]],
        "unchanged": len(work.unchanged),
    }
    record = {
        "extracted": extracted,
        **work.spool.counts(),
        "changes": [
            {**entry, "relative_error": entry["error"] / entry["norm"] if entry["norm"] else 0.0}
            for entry in work.tensors
        ],
    }
    written = write_adapter(
        work.spool, config, card=_card(work, finetune, base, extracted), record=record, overwrite=overwrite
    )
    return Extracted(work.spool.out, written)


def _base_name(base: Checkpoint, given: str) -> str:
    named = base.config.get("_name_or_path")
    return named if isinstance(named, str) and named else given


def _card(work: _Work, finetune: str, base: str, extracted: Mapping[str, Any]) -> str:
    how = f"of rank {work.rank}" if work.rank is not None else f"that keeps {work.energy:g} of the squared norm"
    name = Path(finetune).name
    return f"""---
library_name: peft
tags:
- lora
- merganser
---

# {work.spool.out.name}

A LoRA adapter {how}, extracted by Merganser {__version__} from what `{name}` changed in
`{Path(base).name}`: {plural(extracted["factored"], "weight")} in factors, {plural(len(extracted["saved"]), "tensor")} stored whole,
{len(extracted["dropped"])} left as in the base. Relative error of the whole change: {extracted["error"]:.4g}.
"""


def _check_alike(tuned: Checkpoint, base: Checkpoint) -> None:
    """Refuse models that do not hold the same tensors in the same shapes."""
    for checkpoint in (tuned, base):
        if checkpoint.quantised:
            raise CheckpointError(
                f"{checkpoint.reference}: its weights are quantised ({checkpoint.quantised}): what they changed is rounding "
                "for the most part; give the unquantised model"
            )
    missing = sorted(base.tensors.keys() - tuned.tensors.keys())
    extra = sorted(tuned.tensors.keys() - base.tensors.keys())
    if missing or extra:
        lines = [f"{tuned.reference} and {base.reference} do not hold the same tensors"]
        lines += [f"{len(missing)} only in {base.reference}: {some(missing)}"] if missing else []
        lines += [f"{len(extra)} only in {tuned.reference}: {some(extra)}"] if extra else []
        raise CheckpointError("; ".join(lines))
    if is_tied(tuned.config) != is_tied(base.config):
        raise CheckpointError(f"{tuned.reference} and {base.reference}: the head is tied in one of them only")
    for name, tensor in tuned.tensors.items():
        other = base.tensors[name]
        if tensor.shape != other.shape:
            raise CheckpointError(
                f"{name}: shapes differ: {list(tensor.shape)} in {tuned.reference}, {list(other.shape)} in "
                f"{base.reference}; an adapter keeps the shapes of its base"
            )
        if tensor.dtype.kind != other.dtype.kind:
            raise CheckpointError(
                f"{name}: {tensor.dtype.name} in {tuned.reference}, {other.dtype.name} in {base.reference}"
            )


def _refuse_inputs(out: Path, inputs: list[Checkpoint]) -> None:
    for checkpoint in inputs:
        for path in (checkpoint.path, *checkpoint.weight_files):
            if lies_in(path, resolve_target(out)):
                raise OutputError(f"{out}: {checkpoint.reference}, an input, is in this folder; choose another target")
