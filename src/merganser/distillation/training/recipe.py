"""Recipes of fusion by training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...recipe.document.parsing import read_one
from ...recipe.document.place import Entry, Place
from ...recipe.document.scalar import shown
from ...recipe.fields.data import Data, DataFields, make_data, read_data_fields
from ..losses.choice import CHOICES

__all__ = ["FusionRecipe", "Lora", "TaughtBy", "Training", "load_fusion"]

_KEYS = (
    "student",
    "sources",
    "data",
    "loss",
    "choice",
    "align",
    "chunks",
    "threshold",
    "temperature",
    "lambda",
    "top",
    "training",
    "lora",
    "held_out",
    "held_out_windows",
    "seed",
)
_SOURCE_KEYS = ("model", "cache", "data")
_TRAINING_KEYS = (
    "steps",
    "batch",
    "accumulate",
    "learning_rate",
    "warmup",
    "weight_decay",
    "dtype",
    "gradient_checkpointing",
    "save_every",
)
LOSSES = ("cross_entropy", "alm")
GATE = "gate"
STATISTICS = "statistics"
ALIGNMENTS = ("bytes", "edit_distance", STATISTICS)
SPACES, DEBIASED = "spaces", "debiased"
CHUNKS = ("finest", SPACES, DEBIASED)
_LEARNING_RATE, _LORA_LEARNING_RATE = 1e-5, 2e-4


@dataclass(frozen=True, slots=True)
class TaughtBy:
    """A source.

    Args:
        model: The model that is run; None for a cache.
        cache: The folder of its logit cache; None for a model.
        data: What a model is run on; None for a cache.
        place: Where the recipe names it.
    """

    model: str | None
    cache: str | None
    data: Data | None
    place: Place

    @property
    def name(self) -> str:
        """The reference of the recipe."""
        return self.model or self.cache or ""

    @property
    def read(self) -> tuple[Any, ...]:
        """What is run on what."""
        return (self.model, self.cache, *((self.data.source, self.data.choice) if self.data else ()))


@dataclass(frozen=True, slots=True)
class Training:
    """How the student is trained; see docs/fuse.md.

    Args:
        steps: Number of updates; None for one pass over the sequences.
        batch: Sequences of an update.
        accumulate: Number of parts in which a batch is computed.
        learning_rate: Largest learning rate; None for 1e-5, or 2e-4 for LoRA.
        warmup: Share of the steps in which it rises to that.
        weight_decay: Weight decay of AdamW.
        dtype: Dtype of the arithmetic; weights and their updates are float32.
        gradient_checkpointing: Compute activations twice, to hold fewer of them.
        save_every: Steps between the states from which a killed run continues.
    """

    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = _LEARNING_RATE
    warmup: float = 0.03
    weight_decay: float = 0.1
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    save_every: int = 100


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank updates of all linear layers but the head, which are added to the weights at the end."""

    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class FusionRecipe:
    """A recipe of fusion: the student, its sources, the loss and the training.

    Args:
        student: The model that is taught: a checkpoint, or a recipe of a merge.
        sources: The sources: either all are caches, or all are models with data.
        loss: `cross_entropy` with distributions over tokens, or `alm`, likelihoods of chunks of text.
        choice: How sources share a sequence, one of `CHOICES` or `gate`.
        align: `bytes`, `edit_distance` as FuseLLM aligns, or `statistics` as FuseChat does.
        chunks: `finest`, `spaces` (they end only before a space), or `debiased`.
        threshold: Debiased chunks end only where a word begins with a probability above it.
        temperature: Of ALM.
        lambda_: Share of the text's own tokens in the loss; the rest is the sources'.
        top: Number of likeliest tokens that are asked of models.
        training: How it is trained.
        lora: Low-rank updates; None to train all weights.
        held_out: Texts on which student, fused model and control are measured, by name.
        held_out_windows: Number of windows, or documents, of each.
        seed: Seed of the order of sequences.
        place: Start of the document.
        text: The recipe as written.
    """

    student: str
    sources: tuple[TaughtBy, ...]
    loss: str
    choice: str
    align: str
    chunks: str
    threshold: float
    temperature: float
    lambda_: float
    top: int
    training: Training
    lora: Lora | None
    held_out: Mapping[str, str]
    held_out_windows: int
    seed: int
    place: Place
    text: str = field(repr=False)

    @property
    def from_caches(self) -> bool:
        """Whether all sources are caches, whose texts are then those that are trained on."""
        return self.sources[0].cache is not None


def load_fusion(source: str | Path | Mapping[str, Any]) -> FusionRecipe:
    """Load a recipe of fusion by training.

    Args:
        source: A path, `-` for standard input, a YAML text with a line break, or a mapping.

    Raises:
        RecipeError: It is not valid.
        NotFoundError: There is no such file.
    """
    document = read_one(source, "a fusion")
    root = Entry(document.root, Place(document.file, document.root.line, ""))
    if isinstance(root.value, dict) and "merge_method" in root.value:
        raise root.error("this recipe has a merge_method; merganser merge runs it")
    fields = root.mapping(_KEYS, required=["student", "sources"])
    lora = _lora(fields["lora"]) if "lora" in fields else None
    loss = fields["loss"].choice(LOSSES) if "loss" in fields else LOSSES[0]
    _check_of_loss(fields, loss)
    chunks = fields["chunks"].choice(CHUNKS) if "chunks" in fields else CHUNKS[0]
    if "threshold" in fields and chunks != DEBIASED:
        raise fields["threshold"].error(f"belongs to chunks: {DEBIASED}, and chunks are {chunks}; leave it out")
    return FusionRecipe(
        student=fields["student"].text(),
        sources=_sources(root, fields),
        loss=loss,
        choice=fields["choice"].choice((*CHOICES, GATE)) if "choice" in fields else next(iter(CHOICES)),
        align=fields["align"].choice(ALIGNMENTS) if "align" in fields else ALIGNMENTS[0],
        chunks=chunks,
        threshold=_number(fields.get("threshold"), 0.1, least=0.0, most=1.0),
        temperature=_number(fields.get("temperature"), 100.0, above=0.0),
        lambda_=_number(fields.get("lambda"), 0.9, least=0.0, most=1.0),
        top=fields["top"].whole_number(1) if "top" in fields else 32,
        training=_training(fields.get("training"), lora),
        lora=lora,
        held_out=_held_out(fields.get("held_out")),
        held_out_windows=fields["held_out_windows"].whole_number(1) if "held_out_windows" in fields else 64,
        seed=fields["seed"].whole_number() if "seed" in fields else 0,
        place=root.place,
        text=document.text,
    )


def _check_of_loss(fields: Mapping[str, Entry], loss: str) -> None:
    """Refuse keys that mean nothing for the loss."""
    for key, owner in (
        ("align", LOSSES[0]),
        ("top", LOSSES[0]),
        ("chunks", LOSSES[1]),
        ("temperature", LOSSES[1]),
        ("threshold", LOSSES[1]),
    ):
        if key in fields and loss != owner:
            raise fields[key].error(f"belongs to loss: {owner}, and the loss is {loss}; leave it out")


def _sources(root: Entry, fields: Mapping[str, Entry]) -> tuple[TaughtBy, ...]:
    common = read_data_fields(fields["data"]) if "data" in fields else None
    entries = fields["sources"].items()
    found = tuple(_source(entry, common) for entry in entries)
    caches = [own.cache is not None for own in found]
    if any(caches):
        if not all(caches):
            raise fields["sources"].error(
                "names caches and models; give caches alone, whose texts are trained on, or models alone, with data"
            )
        if "data" in fields:
            raise fields["data"].error("sources are caches, whose own texts are trained on; leave data out")
        if "top" in fields:
            raise fields["top"].error("sources are caches, which hold what was asked for; leave top out")
    for entry, own in zip(entries, found, strict=True):
        if sum(own.read == other.read for other in found) > 1:
            raise entry.error(f"{own.name} is named twice; name each source once")
    return found


def _source(entry: Entry, common: DataFields | None) -> TaughtBy:
    fields = entry.mapping(_SOURCE_KEYS)
    if ("model" in fields) == ("cache" in fields):
        raise entry.error("give a model, or the cache of one: one of the keys 'model' and 'cache'")
    if "cache" in fields:
        if "data" in fields:
            raise fields["data"].error("the cache holds its own texts; leave data out")
        return TaughtBy(None, fields["cache"].text(), None, entry.place)
    own = read_data_fields(fields["data"]) if "data" in fields else None
    for given, where in ((common, entry), (own, fields.get("data", entry))):
        for key in ("labels", "batch_tokens"):
            if given and key in given:
                raise where.error(f"data: {key} has no meaning for a fusion; leave it out")
    if common is None and own is None:
        raise entry.error("a model needs data: give them here, or for all sources")
    data = make_data(entry, common, own)
    return TaughtBy(fields["model"].text(), None, data, entry.place)


def _training(entry: Entry | None, lora: Lora | None) -> Training:
    rate = _LORA_LEARNING_RATE if lora else _LEARNING_RATE
    if entry is None:
        return Training(learning_rate=rate)
    fields = entry.mapping(_TRAINING_KEYS)
    given: dict[str, Any] = {"learning_rate": rate}
    for key in ("steps", "batch", "accumulate", "save_every"):
        if key in fields:
            given[key] = fields[key].whole_number(1)
    if "learning_rate" in fields:
        given["learning_rate"] = _number(fields["learning_rate"], rate, above=0.0)
    if "warmup" in fields:
        given["warmup"] = _number(fields["warmup"], 0.0, least=0.0, most=1.0)
    if "weight_decay" in fields:
        given["weight_decay"] = _number(fields["weight_decay"], 0.0, least=0.0)
    if "dtype" in fields:
        given["dtype"] = fields["dtype"].choice(
            ("float32", "bfloat16"), {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}
        )
    if "gradient_checkpointing" in fields:
        given["gradient_checkpointing"] = fields["gradient_checkpointing"].flag()
    found = Training(**given)
    if found.batch % found.accumulate:
        raise fields["accumulate"].error(
            f"a batch of {found.batch} sequences cannot be divided into {found.accumulate} equal parts"
        )
    return found


def _lora(entry: Entry) -> Lora:
    if not isinstance(entry.value, dict):
        rank = entry.whole_number(1)
        return Lora(rank, 2.0 * rank)
    fields = entry.mapping(("rank", "alpha"), required=["rank"])
    rank = fields["rank"].whole_number(1)
    return Lora(rank, _number(fields.get("alpha"), 2.0 * rank, above=0.0))


def _held_out(entry: Entry | None) -> dict[str, str]:
    if entry is None:
        return {}
    found = {name: own.text() for name, own in entry.mapping().items()}
    if not found:
        raise entry.error("names no text; give NAME: FILE lines, or leave it out")
    for name, file in found.items():
        if not file.endswith((".txt", ".jsonl")):
            raise entry.error(f"{name}: {shown(file)} is not text; give a .txt file, or documents (.jsonl)")
    return found


def _number(
    entry: Entry | None,
    default: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> float:
    if entry is None:
        return default
    value = entry.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise entry.error(f"expected a number, got {shown(value)}")
    if (least is not None and value < least) or (most is not None and value > most):
        limits = f"of at least {least:g}" if most is None else f"from {least:g} to {most:g}"
        raise entry.error(f"expected a number {limits}, got {shown(value)}")
    if above is not None and value <= above:
        raise entry.error(f"expected a number above {above:g}, got {shown(value)}")
    return float(value)
