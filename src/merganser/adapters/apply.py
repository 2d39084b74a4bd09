"""Apply an adapter to a checkpoint: every tensor that it changes is computed while it is read; nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..anatomy import infer_anatomy, is_tied, set_tied
from ..checkpoint import DTYPES, Checkpoint, DType, TensorInfo, derive, renamed
from ..errors import CheckpointError, UnsupportedError
from ..wording import plural
from .adapter import Adapter, LowRank
from .rows import AddedRows, Product, ScaledRows

__all__ = ["with_adapter"]

Tensors = Mapping[str, TensorInfo]

_PREFIXES = (
    "model.",
    "language_model.",
    "model.language_model.",
    "language_model.model.",
    "transformer.",
    "base_model.",
)
_NESTED = ".base_layer"


def with_adapter(checkpoint: Checkpoint, adapter: Adapter, model: str) -> Checkpoint:
    """Return a checkpoint whose tensors are those of a model with an adapter applied.

    Values are W + scale * B A in float32 (float64 if a tensor is), not rounded to the dtype of the base. Tensors that the
    adapter leaves alone are those of the base.

    Args:
        checkpoint: The base.
        adapter: The adapter.
        model: Name of the base in messages.

    Raises:
        CheckpointError: The base lacks a tensor that the adapter changes, or has it in another shape.
        UnsupportedError: The adapter changes something that has no known place in the base.
    """
    found = checkpoint.quantisation
    if found is not None and found.unreadable is not None:
        raise CheckpointError(
            f"{adapter.path}: {model}: its weights are quantised ({found.evidence}); {found.unreadable}; use the "
            "unquantised model"
        )
    binding = _Binding(checkpoint, adapter, model)
    tensors = binding.tensors()
    config = checkpoint.config if not binding.unties else set_tied(checkpoint.config, tied=False)
    return replace(
        checkpoint,
        reference=f"{checkpoint.reference}+{adapter.reference}",
        tensors=tensors,
        config=config,
        weight_files=[*checkpoint.weight_files, adapter.file],
        adapter=(adapter.config.file, adapter.file),
        notes=(*binding.notes, *_base_note(checkpoint, adapter, model)),
    )


def _base_note(checkpoint: Checkpoint, adapter: Adapter, model: str) -> list[str]:
    """Return a note if the adapter names another base than the one given."""
    named = adapter.config.base
    given = {checkpoint.reference, model, checkpoint.config.get("_name_or_path"), checkpoint.path.name}
    last = {str(name).rstrip("/").rpartition("/")[2].lower() for name in given if name}
    if not named or named.rstrip("/").rpartition("/")[2].lower() in last:
        return []
    return [
        f"{adapter.path}: names {named} as its base, and is applied to {model}; names and shapes of the tensors fit, their "
        "values were not compared"
    ]


class _Binding:
    """Finds the tensor of the base that each part of an adapter changes."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, model: str) -> None:
        self.adapter = adapter
        self.model = model
        self.base = checkpoint.tensors
        self.notes: list[str] = []
        self.anatomy = infer_anatomy({name: tensor.shape for name, tensor in self.base.items()}, checkpoint.config)
        tied = is_tied(checkpoint.config)
        embedding = self.anatomy.embedding
        self._head = None
        if embedding is not None and (self.anatomy.tied if tied is None else tied):
            aliases = [alias for alias, source in self.anatomy.tied if source == embedding]
            self._head = next(iter(aliases), None if self.anatomy.head else "lm_head.weight")
        if self._head in self.base:
            self._head = None
        self.unties = False
        self._prefixes = self._rename()

    def tensors(self) -> dict[str, TensorInfo]:
        """Return all tensors of the model with the adapter."""
        changed: dict[str, TensorInfo] = {}
        for name, tensor in self.adapter.replaced.items():
            own = self._name(name)
            base = self._find(own, tensor.shape)
            changed[own] = self._as_base(own, tensor, base)
        for own, change in self._low_rank():
            base = changed.get(own) or self._weight(own)
            changed[own] = self._added(own, base, change)
        for module, factors in self.adapter.scaled.items():
            changed |= self._scaled(self._name(module), factors)
        return self._with_head(changed)

    def _low_rank(self) -> list[tuple[str, LowRank]]:
        """Return the low-rank changes with the names of the tensors that they change."""
        found = []
        taken: dict[str, LowRank] = {}
        for module, change in self.adapter.changes.items():
            name = self._target(module, change)
            if name in taken:
                raise CheckpointError(
                    f"{self.adapter.file}: changes {name} twice, by {taken[name].module} and {module}"
                )
            taken[name] = change
            found.append((name, change))
        return found

    def _target(self, module: str, change: LowRank) -> str:
        """Return the name of the tensor that factors belong to."""
        plain = self._name(f"{module}.weight")
        if self._holds(plain) and not self._is_parameter(module):
            return plain
        # parameters that are not modules: their factors have the names of the module that holds them
        holder = module
        while holder.endswith(_NESTED):
            holder = holder.removesuffix(_NESTED)
        names = [self._name(f"{holder}.{end.rpartition('.')[2]}") for end in self._parameters(holder)]
        fitting = [name for name in names if self._holds(name) and _experts(self._weight(name), change) is not None]
        if len(fitting) == 1:
            return fitting[0]
        if len(fitting) > 1:
            raise UnsupportedError(
                f"{self.adapter.file}: {module}: its factors fit {' and '.join(fitting)}, and the file does not say which "
                "they belong to"
            )
        if names and not any(self._holds(name) for name in names):
            raise UnsupportedError(
                f"{self.adapter.file}: target_parameters: {names[0]} is not in {self.model}, whose files name or pack its "
                "experts otherwise; merge it with peft and give the merged model"
            )
        if names:
            self._find(names[0], change.shape)
        self._find(plain, change.shape)
        raise AssertionError(plain)

    def _parameters(self, holder: str) -> list[str]:
        """Return the parameters of a module that the config says are changed."""
        found = []
        for end in self.adapter.config.parameters:
            module, _, _ = end.rpartition(".")
            if not module or holder == module or holder.endswith(f".{module}"):
                found.append(end)
        return found

    def _is_parameter(self, module: str) -> bool:
        return module.endswith(_NESTED)

    def _added(self, name: str, base: TensorInfo, change: LowRank) -> TensorInfo:
        if len(base.shape) == 3:
            packed = _experts(base, change)
            if packed is None:
                self._refuse_shape(name, change.shape, base)
                raise AssertionError(name)
            product = Product(change.a, change.b, change.scale, packed == "in out", base.shape[0])
            if packed == "either":
                raise UnsupportedError(
                    f"{self.adapter.file}: {name} is {list(base.shape)}: the experts are square, so it is not known "
                    "whether they are stored [in, out] or [out, in]"
                )
        else:
            self._check_shape(name, change.shape, base)
            if change.a.shape[0] != change.rank:
                raise CheckpointError(
                    f"{self.adapter.config.file}: {change.module} has rank {change.rank} by the config, and A has "
                    f"{change.a.shape[0]} rows"
                )
            product = Product(change.a, change.b, change.scale, change.transposed)
        dtype = _wide(base, change.a, change.b)
        parts = [change.a, change.b, *([] if change.lengths is None else [change.lengths]), base]
        rows = AddedRows(base, product, _torch(dtype), change.lengths)
        return derive(name, base.shape, parts, rows, natural=base.natural or base.dtype, dtype=dtype)

    def _scaled(self, module: str, factors: TensorInfo) -> dict[str, TensorInfo]:
        weight = self._find(f"{module}.weight", None)
        by_output = factors.shape[1] == 1 and factors.shape[0] != 1
        turned = self.adapter.config.transposed
        height = weight.shape[0] if by_output is not turned else weight.shape[-1]
        if len(weight.shape) != 2 or factors.numel != height:
            raise CheckpointError(
                f"{self.adapter.file}: {module} has {factors.numel} factors of {'outputs' if by_output else 'inputs'}, "
                f"and its weight is {list(weight.shape)} in {self.model}; is it an adapter of another model?"
            )
        changed = {weight.name: self._multiplied(weight, factors, by_row=by_output is not turned)}
        bias = self.base.get(f"{module}.bias")
        if by_output and bias is not None:
            changed[bias.name] = self._multiplied(bias, factors, by_row=False)
        return changed

    def _multiplied(self, base: TensorInfo, factors: TensorInfo, *, by_row: bool) -> TensorInfo:
        dtype = _wide(base, factors)
        rows = ScaledRows(base, factors, by_row, _torch(dtype))
        return derive(base.name, base.shape, [factors, base], rows, natural=base.natural or base.dtype, dtype=dtype)

    def _as_base(self, name: str, tensor: TensorInfo, base: TensorInfo) -> TensorInfo:
        """Return a tensor of the adapter under the base's name; an output stores it in the base's dtype."""
        found = renamed(tensor, name)
        wide = found.dtype.bits > (base.natural or base.dtype).bits
        return replace(found, natural=base.natural or base.dtype) if wide else found

    def _with_head(self, changed: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Add the tensors that stay, and a head of its own where the adapter changes a tied one or its embedding alone."""
        tensors = {name: changed.get(name, tensor) for name, tensor in self.base.items()}
        if self._head is None:
            return tensors
        embedding = self.anatomy.embedding
        assert embedding is not None
        if self._head not in changed and embedding not in changed:
            return tensors
        if self.adapter.config.keeps_ties:
            if self._head in changed:
                raise UnsupportedError(
                    f"{self.adapter.config.file}: ensure_weight_tying: the file changes {self._head} by itself, which is "
                    "tied to the embeddings; merge it with peft and give the merged model"
                )
            return tensors
        self.unties = True
        which = embedding if embedding in changed else self._head
        self.notes.append(
            f"{self.adapter.path}: changes {which} alone, which is tied in {self.model}; the model has a head of its own "
            "with the adapter, as in training (peft would change both when it merges)"
            if not (embedding in changed and self._head in changed)
            else f"{self.adapter.path}: changes {embedding} and {self._head}, which are tied in {self.model}; with the "
            "adapter they are not"
        )
        tensors[self._head] = changed.get(self._head) or renamed(self.base[embedding], self._head)
        return tensors

    def _name(self, name: str) -> str:
        """Return the base's name for a name of the adapter."""
        old, new = self._prefixes
        return new + name.removeprefix(old) if name.startswith(old) else name

    def _rename(self) -> tuple[str, str]:
        """Find what is before the names in the base and not in the adapter, or the other way round."""
        wanted = [f"{module}.weight" for module in (*self.adapter.changes, *self.adapter.scaled)]
        wanted = [name for name in (wanted or [*self.adapter.replaced]) if _NESTED not in name]
        layers = [name for name in wanted if "layers." in name or ".h." in name]
        if not layers or any(name in self.base for name in layers) or self.adapter.config.parameters:
            return "", ""
        for old in ("", *_PREFIXES):
            for new in ("", *_PREFIXES):
                if all(name.startswith(old) and new + name.removeprefix(old) in self.base for name in layers):
                    self.notes.append(
                        f"{self.adapter.path}: the names of its tensors begin with {old or 'nothing'!r} where those of "
                        f"{self.model} begin with {new or 'nothing'!r}; matched so"
                    )
                    return old, new
        return "", ""

    def _holds(self, name: str) -> bool:
        return name in self.base or name == self._head

    def _weight(self, name: str) -> TensorInfo:
        """Return a tensor of the base; for a tied head, its embedding under the head's name."""
        if name == self._head:
            assert self.anatomy.embedding is not None
            return renamed(self.base[self.anatomy.embedding], name)
        return self.base[name]

    def _find(self, name: str, shape: tuple[int, ...] | None) -> TensorInfo:
        """Return a tensor of the base, of this shape if one is given.

        Raises:
            CheckpointError: There is none, or it has another shape.
        """
        if not self._holds(name):
            names = [
                *(self._name(f"{m.removesuffix(_NESTED)}.weight") for m in self.adapter.changes),
                *map(self._name, self.adapter.replaced),
            ]
            others = sum(not self._holds(other) for other in names) - 1
            more = f" and {plural(others, 'more tensor')}" if others > 0 else ""
            raise CheckpointError(
                f"{self.adapter.file}: changes {name}{more}, not found in {self.model}; is it an adapter of another model?"
            )
        tensor = self._weight(name)
        if shape is not None:
            self._check_shape(name, shape, tensor)
        return tensor

    def _check_shape(self, name: str, shape: tuple[int, ...], tensor: TensorInfo) -> None:
        if tensor.shape != shape:
            self._refuse_shape(name, shape, tensor)

    def _refuse_shape(self, name: str, shape: tuple[int, ...], tensor: TensorInfo) -> None:
        """Raise the error for a tensor of another shape in the base."""
        part = self.anatomy.parts.get(tensor.name)
        rows = part is not None and part.role in ("embedding", "head") and tensor.shape[1:] == shape[1:]
        remedy = (
            "its vocabulary was resized in training, so the model must be resized first"
            if rows
            else "is it an adapter of another model?"
        )
        raise CheckpointError(
            f"{self.adapter.file}: {name} is {list(shape)} here and {list(tensor.shape)} in {self.model}; {remedy}"
        )


def _experts(base: TensorInfo, change: LowRank) -> str | None:
    """Return how packed experts are stored, by the shapes of the factors: "in out", "out in" or "either"."""
    if len(base.shape) == 2:
        return "out in" if change.shape == base.shape else None
    if len(base.shape) != 3 or change.a.shape[0] != base.shape[0] * change.rank:
        return None
    sides = (change.a.shape[1], change.b.shape[0])
    fits = [way for way, own in (("in out", base.shape[1:]), ("out in", base.shape[:0:-1])) if sides == own]
    return fits[0] if len(fits) == 1 else ("either" if fits else None)


def _wide(*tensors: TensorInfo) -> DType:
    return DTYPES["F64" if any(tensor.dtype.name == "float64" for tensor in tensors) else "F32"]


def _torch(dtype: DType) -> Any:
    import torch

    return getattr(torch, dtype.name)
