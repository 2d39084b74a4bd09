"""How an output is written as GGUF: names and types of its tensors, and metadata from a file of the same family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoint import Checkpoint, Shard
from ...checkpoint.files.weights import GGUF_SUFFIX
from ...checkpoint.formats.gguf.encode import WRITABLE, GgufEncoding
from ...checkpoint.formats.gguf.header import GgufHeader, GgufTensor, GgufType, read_gguf_header
from ...checkpoint.formats.gguf.layout import GgufOutput, lay_out_gguf
from ...checkpoint.formats.gguf.mixes import FILE_TYPES, Sizes, tensor_type
from ...checkpoint.formats.gguf.names import DROPPED, Family, StoredName, family_of, gguf_name, hf_name
from ...checkpoint.formats.gguf.read import head_rows, parts_of
from ...checkpoint.formats.gguf.values import require_gguf
from ...errors import CheckpointError, RecipeError
from ...recipe import Recipe
from ...recipe.fields.gguf import SAME
from ...wording import some
from .tensor import PlannedTensor

__all__ = ["GgufSummary", "gguf_output"]

_QUANTISATION_VERSION = 2
_ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")
_ABOUT_SPLIT = ("split.no", "split.count", "split.tensors.count")
_ABOUT_IMPORTANCE = "quantize.imatrix."


@dataclass(frozen=True, slots=True)
class GgufSummary:
    """How the output is written as GGUF.

    Args:
        file: Name of the file.
        type: The type of the file, or "same" for that of the metadata.
        metadata: File whose metadata it has.
        kept: Tensors of that file that are copied as they are.
    """

    file: str
    type: str
    metadata: Path
    kept: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the run record."""
        return {"file": self.file, "type": self.type, "metadata": str(self.metadata), "copied": list(self.kept)}


@dataclass(frozen=True, slots=True)
class _Like:
    """The file whose metadata are copied: its parts, their headers, and its family."""

    files: Sequence[Path]
    headers: Sequence[GgufHeader]
    family: Family

    @property
    def tensors(self) -> list[tuple[Path, GgufTensor]]:
        parts = zip(self.files, self.headers, strict=True)
        return [(file, tensor) for file, header in parts for tensor in header.tensors]

    @property
    def types(self) -> dict[str, str]:
        """The type of each tensor by its name; and by the module alone, that of most layers."""
        found = {tensor.name: tensor.type.name for _, tensor in self.tensors}
        counts: dict[str, Counter[str]] = {}
        for name, kind in found.items():
            counts.setdefault(_without_layer(name), Counter())[kind] += 1
        return {**{module: count.most_common(1)[0][0] for module, count in counts.items()}, **found}

    def sizes(self, layers: int, tied: bool) -> Sizes:
        """Return what types depend on."""
        first = self.headers[0]
        heads = first.number("attention.head_count") or 0
        keys = first.number("attention.head_count_kv")
        experts = first.number("expert_count") or 0
        return Sizes(first.architecture, layers, experts, heads, heads if keys is None else keys, tied)


def gguf_output(
    recipe: Recipe,
    drafts: Sequence[PlannedTensor],
    donor: Checkpoint,
    *,
    moved_tokens: bool,
    chat_template: str | None,
    block: int,
) -> tuple[list[PlannedTensor], list[Shard], GgufSummary | None]:
    """Plan how each tensor is stored in the GGUF file that the recipe asks for.

    Args:
        recipe: The recipe.
        drafts: The tensors of the output.
        donor: The model that lends config and tokenizer.
        moved_tokens: Whether the output's tokens are not those of the donor.
        chat_template: The output's chat template, if it is not the donor's.
        block: Most elements per block.

    Returns:
        The tensors, the file, and a summary; without the key in the recipe the tensors alone.

    Raises:
        RecipeError: This output cannot be stored so.
        CheckpointError: The file with the metadata is malformed or of another model.
    """
    if recipe.gguf is None:
        return list(drafts), [], None
    place, kind = recipe.gguf.place, recipe.gguf.type
    if any(draft.method.sidecar is not None for draft in drafts):
        raise RecipeError(
            f"{place}: the method stores what restores each model from the merged weights, which GGUF has no place for; "
            "leave 'gguf' out"
        )
    like = _open(recipe, donor)
    if moved_tokens:
        raise RecipeError(f"{place}: the output has other tokens than {like.files[0]}. {_by_llama_cpp(kind)}")
    stored = _names(recipe, drafts, like)
    layers = _check_layers(recipe, drafts, stored, like)
    tied = "output" not in {own.module for own in stored.values()}
    types = _types(recipe, drafts, stored, like, like.sizes(layers, tied))
    tensors = [_encoded(draft, stored[draft.name], types[draft.name], like, block=block) for draft in drafts]
    if quantised := any(kind.values > 1 for kind in types.values()):
        require_gguf(str(place))
    kept = [(file, tensor) for file, tensor in like.tensors if DROPPED.fullmatch(tensor.name) and "." in tensor.name]
    kept = [each for each in kept if not each[1].name.startswith("blk.")]
    changes = _changes(recipe, like.headers[0], layers, chat_template, quantised=quantised)
    outputs = _outputs(recipe, tensors, stored)
    shard = lay_out_gguf(
        f"model-{_named(kind, like)}{GGUF_SUFFIX}", (like.files[0], like.headers[0]), changes, kept, outputs
    )
    return tensors, [shard], GgufSummary(shard.name, kind, like.files[0], tuple(tensor.name for _, tensor in kept))


def _open(recipe: Recipe, donor: Checkpoint) -> _Like:
    assert recipe.gguf is not None
    place = recipe.gguf.place
    if recipe.gguf.metadata is not None:
        files = parts_of(Path(recipe.gguf.metadata).expanduser())
        if not files[0].name.endswith(GGUF_SUFFIX):
            raise RecipeError(f"{place}: metadata: {files[0]} is no GGUF file; its name must end in {GGUF_SUFFIX}")
    else:
        # the files of an adapter may follow
        files = [file for file in donor.weight_files if file.name.endswith(GGUF_SUFFIX)]
        if not files:
            raise RecipeError(
                f"{place}: {donor.reference}, which lends config and tokenizer, is no GGUF file. Name one of this "
                f"architecture and vocabulary, whose metadata are copied: gguf: {{type: {recipe.gguf.type}, metadata: "
                f"FILE.gguf}}. {_by_llama_cpp(recipe.gguf.type)}"
            )
    headers = [read_gguf_header(file) for file in files]
    family = family_of(str(files[0]), headers[0].architecture)
    if not family.is_writable:
        raise RecipeError(
            f"{place}: files of the architecture {headers[0].architecture!r} can be read and not written. "
            f"{_by_llama_cpp(recipe.gguf.type)}"
        )
    return _Like(files, headers, family)


def _named(kind: str, like: _Like) -> str:
    """Return the type in the file's name."""
    number = like.headers[0].fields.get("general.file_type")
    return next((name for name, own in FILE_TYPES.items() if own == number), kind) if kind == SAME else kind


def _without_layer(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def _by_llama_cpp(kind: str) -> str:
    """Return the sentence with the commands that make such a file of safetensors."""
    kind = "F16" if kind == SAME else kind
    first = kind if kind in ("F32", "F16", "BF16", "Q8_0") else "F16"
    convert = f"python convert_hf_to_gguf.py OUT --outtype {first.lower()} --outfile OUT-{first}.gguf"
    quantise = "" if kind == first else f" && llama-quantize OUT-{first}.gguf OUT-{kind}.gguf {kind}"
    return f"Or leave 'gguf' out, and convert the output with llama.cpp: {convert}{quantise}"


def _names(recipe: Recipe, drafts: Sequence[PlannedTensor], like: _Like) -> dict[str, StoredName]:
    """Return the name in the file of each tensor.

    Raises:
        RecipeError: The family has no such tensor.
    """
    assert recipe.gguf is not None
    found = {}
    for draft in drafts:
        own = gguf_name(like.family, draft.name)
        if own is None or draft.copy:
            raise RecipeError(
                f"{recipe.gguf.place}: {draft.name}: the architecture {like.headers[0].architecture!r} of {like.files[0]} has "
                f"no such tensor. {_by_llama_cpp(recipe.gguf.type)}"
            )
        found[draft.name] = own
    return found


def _check_layers(
    recipe: Recipe, drafts: Sequence[PlannedTensor], stored: Mapping[str, StoredName], like: _Like
) -> int:
    """Compare the output's modules and their shapes with those of the file; return the number of layers.

    Raises:
        CheckpointError: They differ.
    """
    assert recipe.gguf is not None
    ours: dict[tuple[str, bool], tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    for draft in drafts:
        own = stored[draft.name]
        shape = draft.shape
        if own.expert is not None:
            experts[own.module] = max(experts.get(own.module, 0), own.expert + 1)
            shape = (experts[own.module], *shape)
        ours[own.name.rpartition(".")[2] + own.module, own.layer is None] = _squeezed(shape)
    theirs: dict[tuple[str, bool], tuple[int, ...]] = {}
    for _, tensor in like.tensors:
        named = hf_name(like.family, tensor.name)
        if named is not None:
            theirs[tensor.name.rpartition(".")[2] + named[1], not tensor.name.startswith("blk.")] = _squeezed(
                tensor.shape
            )
    for either in (ours, theirs):
        either.pop(("weightoutput", True), None)
    if ours != theirs:
        key = min((key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)), key=str)
        module = key[0].removeprefix("weight").removeprefix("bias")
        raise CheckpointError(
            f"{recipe.gguf.place}: {module} is {_shown(ours.get(key))} in the output, and {_shown(theirs.get(key))} in "
            f"{like.files[0]}; the metadata must be those of a model of the same sizes"
        )
    return 1 + max((own.layer for own in stored.values() if own.layer is not None), default=-1)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def _shown(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))


def _encoded(draft: PlannedTensor, own: StoredName, kind: GgufType, like: _Like, *, block: int) -> PlannedTensor:
    """Return a tensor with how it is stored: blocks of merging hold whole heads and rows."""
    flat = len(draft.shape) < 2
    permuted = like.family.permuted and own.module in ("attn_q", "attn_k")
    encoding = GgufEncoding(
        type=kind,
        columns=1 if flat else draft.shape[-1],
        head=head_rows(like.files[0], like.headers[0], own.name, draft.shape[0]) if permuted else 0,
        plus_one=like.family.norms_plus_one and draft.name.endswith("norm.weight"),
    )
    return replace(draft, gguf=encoding, block_limit=max(block // encoding.step, 1) * encoding.step)


def _types(
    recipe: Recipe, drafts: Sequence[PlannedTensor], stored: Mapping[str, StoredName], like: _Like, sizes: Sizes
) -> dict[str, GgufType]:
    """Return the type of each tensor: vectors and routers are float32, as llama.cpp needs them.

    Raises:
        RecipeError: The file whose types are kept has one that cannot be written.
    """
    assert recipe.gguf is not None
    kind = recipe.gguf.type
    kept = like.types if kind == SAME else {}
    found = {}
    for draft in drafts:
        own = stored[draft.name]
        if len(_squeezed(draft.shape)) < 2 or own.module in _ROUTERS:
            name = "F32"
        elif kind == SAME:
            # a layer of a stack that the file lacks, and a head beside an embedding that was the head
            name = kept.get(own.name) or kept.get(_without_layer(own.name)) or kept["token_embd.weight"]
        else:
            name = tensor_type(kind, own.module, own.layer or 0, draft.shape[-1], sizes)
        if name not in WRITABLE:
            raise RecipeError(
                f"{recipe.gguf.place}: {own.name} of {like.files[0]} is {name}, which cannot be written; name a type "
                f"instead of {SAME!r}, such as Q4_K_M"
            )
        found[draft.name] = WRITABLE[name]
    return found


def _changes(
    recipe: Recipe, header: GgufHeader, layers: int, chat_template: str | None, *, quantised: bool
) -> dict[str, str | int | None]:
    """Return the entries of the metadata that differ from those of the file."""
    assert recipe.gguf is not None
    kind = recipe.gguf.type
    title = header.fields.get("general.name", header.architecture)
    found: dict[str, str | int | None] = dict.fromkeys(_ABOUT_SPLIT)
    found |= dict.fromkeys(key for key in header.fields if key.startswith(_ABOUT_IMPORTANCE))
    found["general.name"] = recipe.name or f"{title}, merged"
    if kind != SAME:
        found["general.file_type"] = FILE_TYPES[kind]
    found["general.quantization_version"] = _QUANTISATION_VERSION if quantised else None
    if chat_template is not None:
        found["tokenizer.chat_template"] = chat_template
    key = f"{header.architecture}.block_count"
    stated = header.fields.get(key)
    if stated != layers:
        lists = [k for k, v in header.fields.items() if isinstance(v, list) and len(v) == stated]
        if lists:
            raise RecipeError(
                f"{recipe.gguf.place}: the output has {layers} layers, and {some(lists, 2)} of the metadata says something of "
                f"each of {stated}. {_by_llama_cpp(kind)}"
            )
        found[key] = layers
    return found


def _outputs(recipe: Recipe, tensors: Sequence[PlannedTensor], stored: Mapping[str, StoredName]) -> list[GgufOutput]:
    """Return the tensors of the file: experts are parts of a stack."""
    assert recipe.gguf is not None
    found: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        found.setdefault(stored[tensor.name].name, []).append(tensor)
    outputs = []
    for name, parts in found.items():
        first = parts[0]
        assert first.gguf is not None
        stacked = stored[first.name].expert is not None
        if stacked:
            parts.sort(key=lambda tensor: stored[tensor.name].expert or 0)
            if [stored[tensor.name].expert for tensor in parts] != list(range(len(parts))):
                raise CheckpointError(f"{recipe.gguf.place}: {name}: an expert is missing in the output")
        shape = (len(parts), *first.shape) if stacked else _squeezed(first.shape)
        sizes = tuple((tensor.name, first.gguf.nbytes(tensor.size)) for tensor in parts)
        outputs.append(GgufOutput(name, shape, first.gguf.type, sizes))
    return outputs
