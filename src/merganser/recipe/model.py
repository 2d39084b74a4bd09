"""The contents of a recipe, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .document.place import Place
from .fields.align import Align
from .fields.data import Data
from .fields.gguf import Gguf
from .fields.reference import ModelReference
from .fields.setting import Setting
from .fields.tokens import TokenRule


@dataclass(frozen=True, slots=True)
class Source:
    """A model, or a range of its layers, in a slice.

    Args:
        model: The checkpoint.
        layer_range: First layer, and the one after the last; None for the whole model.
        parameters: Settings for this model alone.
        place: Where the entry stands in the recipe.
        name: Name of the model in the output, for methods that store something per model; None for the name of its
            folder.
        statistics: Folder with calibration statistics of this model; None if the recipe names none.
        data: Data to make such statistics from; None if the recipe names none, or names statistics.
        base_statistics: The same of the base, on the data of this model.
    """

    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: Mapping[str, Setting]
    place: Place
    name: str | None = None
    statistics: str | None = None
    data: Data | None = None
    base_statistics: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of the output; it has as many layers as each of its sources.

    Args:
        sources: The models, and the base if it is listed.
        parameters: Settings for this slice.
        base_model: The base of this slice; None for the recipe's base.
        place: Where the slice stands in the recipe.
    """

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting]
    base_model: ModelReference | None
    place: Place


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a larger model, with what is merged into it.

    Args:
        name: The part as the recipe names it: `text_decoder`, `vision_tower`, `encoder`, ...
        slices: Which of the recipe's slices are of this part.
        whole: Whether whole models are merged; their only slice has no ranges of layers.
        place: Where the module stands in the recipe.
    """

    name: str
    slices: range
    whole: bool
    place: Place


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as written; `Resolver` interprets it for its merge method.

    Args:
        name: Name of a stage, or a title.
        merge_method: Name of the merge method.
        models: The models; empty if there are slices.
        slices: The slices; empty if there are models. Those of all modules, if there are modules.
        base_model: The base; None if the recipe names none.
        parameters: Settings for all slices and models.
        dtype: Type that every input is cast to when it is read; also the type of the output if there is no `out_dtype`.
        out_dtype: Type of the output.
        tokenizer_donor: The model whose tokenizer the output gets; None for the donor. It need not be one that is merged.
        tokenizer_union: Where the recipe asks for the union of all tokenizers; None if it does not.
        token_rules: Where the rows of single tokens come from; these tokens are added where the tokenizer lacks them.
        row_multiple: Number of which the rows of the output's embedding are a multiple.
        chat_template: Jinja text for the output; "auto" for the one that most of the models have; None for the donor's.
        compat: "mergekit" to compute the same numbers as mergekit.
        random_seed: Seed, used if the command line gives none.
        place: Start of the document.
        text: The document as written.
        places: Where each top-level key stands.
        warnings: Warnings about entries of the recipe that have no effect.
        unmatched: What to do with tensors after the layers that some models lack or hold in another shape: "refuse"
            them, take them from the "base", or "skip" them.
        quantised: What to do with models that are quantised in another way than the base: "refuse" or "allow" them.
        quantize: How the weights of linear layers are stored as float8; None if they are not.
        gguf: How the output is written as GGUF; None if it is not.
        check_statistics: Whether statistics must be of the weights that are merged.
        keep_statistics: Folder in which statistics that are made for this merge are kept; None to remove them.
        rank: For adapters, the rank of the output; None for as much as loses nothing.
        align: How models are permuted to a reference before they are merged; None if they are merged as they are.
        space: For adapters, where a method for weights works: on the small matrices of the "core", or on "full" ones.
        modules: The parts of a larger model that are merged each in its own way; empty if the model is merged as one.
    """

    name: str | None
    merge_method: str
    models: tuple[Source, ...]
    slices: tuple[Slice, ...]
    base_model: ModelReference | None
    parameters: Mapping[str, Setting]
    dtype: str | None
    out_dtype: str | None
    tokenizer_donor: ModelReference | None
    chat_template: str | None
    compat: Literal["mergekit"] | None
    random_seed: int | None
    place: Place
    text: str = field(repr=False)
    places: Mapping[str, Place] = field(repr=False)
    warnings: tuple[str, ...] = ()
    tokenizer_union: Place | None = None
    token_rules: tuple[TokenRule, ...] = ()
    row_multiple: int = 1
    unmatched: Literal["refuse", "base", "skip"] = "refuse"
    quantised: Literal["refuse", "allow"] = "refuse"
    quantize: str | None = None
    gguf: Gguf | None = None
    keep_statistics: str | None = None
    rank: int | None = None
    space: Literal["core", "full"] | None = None
    check_statistics: bool = True
    modules: tuple[Module, ...] = ()
    align: Align | None = None

    @property
    def declared_dtype(self) -> str | None:
        """The dtype of the output, if the recipe says it."""
        return self.out_dtype or (self.gguf.dtype if self.gguf else None) or self.dtype

    @property
    def names_data(self) -> bool:
        """Whether the recipe names data, at its top, for a model or to align, or a folder to keep statistics in."""
        sources = [*self.models, *(source for piece in self.slices for source in piece.sources)]
        if self.align is not None and self.align.data is not None:
            return True
        return bool({"data", "keep_statistics"} & self.places.keys()) or any(s.data is not None for s in sources)

    def place_of(self, key: str) -> Place:
        """Return where a top-level key stands; the start of the recipe if it is missing."""
        return self.places.get(key, self.place)

    def place_of_model(self, model: ModelReference) -> Place:
        """Return where the recipe first names a checkpoint."""
        if model == self.base_model:
            return self.place_of("base_model")
        sources = [*self.models, *(source for piece in self.slices for source in piece.sources)]
        based = [(piece.base_model, piece.place) for piece in self.slices]
        places = [(source.model, source.place) for source in sources] + based
        return next((place for named, place in places if named == model), self.place)

    @property
    def by_token(self) -> bool:
        """Whether rows of embeddings and heads are matched by their tokens: where the recipe chooses a tokenizer."""
        return self.tokenizer_donor is not None or bool(self.token_rules) or self.row_multiple > 1

    @property
    def donor(self) -> ModelReference:
        """The model whose config, tokenizer and other side files the output gets: the base, else the first model."""
        return self.references()[0]

    def references(self) -> tuple[ModelReference, ...]:
        """Return every checkpoint once: the base first if there is one, then in the order of appearance."""
        found = [self.base_model]
        found += [source.model for source in self.models]
        for piece in self.slices:
            found += [source.model for source in piece.sources]
            found.append(piece.base_model)
        return tuple(dict.fromkeys(reference for reference in found if reference is not None))
