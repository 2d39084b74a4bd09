"""A folder of models that have one tokenizer, opened and not yet loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....adapters import is_adapter, split_reference
from ....errors import CheckpointError, NotFoundError, ParameterError
from ....inference.language_model import LanguageModel, Tokenizer, open_model
from ....inference.stored import open_stored
from ....jsonfile import exists
from ....record.format import RECORD_NAME
from ..folders import is_model
from ..gated.stored import GATES_FILE

__all__ = ["Experts", "open_experts"]

_WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Experts:
    """Models that have one tokenizer.

    Args:
        name: What the user calls them.
        names: Their names, those of their folders.
        models: The models, in the same order.
        file: Where the mixture of them is stored.
        recorded: The folder whose run record lists that file; None if there is no record.
    """

    name: str
    names: tuple[str, ...]
    models: tuple[LanguageModel, ...]
    file: Path
    recorded: Path | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.models[0].tokenizer

    @property
    def positions(self) -> int | None:
        """Most tokens that every expert can see; None without a limit."""
        known = [model.positions for model in self.models if model.positions is not None]
        return min(known, default=None)

    @property
    def hashes(self) -> tuple[str, ...]:
        """Hash of each expert: of its weights, config and tokenizer."""
        return tuple(model.source.hash for model in self.models)


def open_experts(
    reference: str | Path, tokenizers: dict[str, Tokenizer] | None = None, *, cache_dir: Path | None = None
) -> Experts:
    """Open the models of a folder; weights are not read.

    Args:
        reference: A folder that has a folder for each model.
        tokenizers: As for `open_model`.
        cache_dir: Folder for models from the Hub.

    Raises:
        NotFoundError: There is no such folder, or no model in it.
        CheckpointError: A model is damaged or no language model, has no tokenizer or another one, or is an adapter.
        ParameterError: A base is named.
    """
    text = str(reference)
    if not exists(text) and (folder := split_reference(text)[1]) is not None:
        raise ParameterError(f"{text}: experts of unequal sizes have no base; give their folder alone: {folder}")
    path = Path(text).expanduser()
    if not path.is_dir():
        raise NotFoundError(f"{path}: {'is not a folder' if path.exists() else 'no such folder'}")
    names = _names(path)
    known = {} if tokenizers is None else tokenizers
    models = tuple(open_model(open_stored(path / name, cache_dir=cache_dir), known) for name in names)
    for name, model in zip(names, models, strict=True):
        if reason := _difference(models[0].tokenizer, model.tokenizer):
            raise CheckpointError(
                f"{path}: {name} has another tokenizer than {names[0]}: {reason}; experts of a mixture must read the same tokens"
            )
    return Experts(text, names, models, path / GATES_FILE, path if (path / RECORD_NAME).exists() else None)


def _names(path: Path) -> tuple[str, ...]:
    found = []
    for entry in sorted(path.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if is_adapter(str(entry)):
            raise CheckpointError(
                f"{entry}: is an adapter, and experts of unequal sizes are whole models; write the model that it makes of its "
                "base beside the others, or move it away"
            )
        if is_model(entry):
            found.append(entry.name)
        elif any(file.suffix in _WEIGHTS for file in entry.iterdir()):
            raise CheckpointError(f"{entry}: has weights and no config.json, so it is not known what model this is")
    if not found:
        raise NotFoundError(f"{path}: has no folders of models (config.json), so there are no experts to mix")
    return tuple(found)


def _difference(first: Tokenizer, other: Tokenizer) -> str | None:
    """Return in what two tokenizers differ; None if both make the same tokens of every text."""
    if first.hash == other.hash:
        return None
    ours, theirs = first.encoder.get_vocab(), other.encoder.get_vocab()
    if ours != theirs:
        odd = min((token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)), key=repr)
        return f"token {odd!r} is {_shown(theirs.get(odd))} and {_shown(ours.get(odd))}"
    rules, others = _rules(first.encoder), _rules(other.encoder)
    if odd := sorted(key for key in rules.keys() | others.keys() if rules.get(key) != others.get(key)):
        return f"they have the same tokens and cut texts in other ways ({', '.join(odd)} of tokenizer.json)"
    samples: Sequence[list[int]] = [each.encoder("a")["input_ids"] for each in (first, other)]
    if samples[0] != samples[1]:
        return f"'a' becomes the tokens {samples[1]} and {samples[0]}"
    return None


def _rules(encoder: Any) -> dict[str, Any]:
    """Return what decides which tokens a text becomes, of a tokenizer.json."""
    found = json.loads(encoder.backend_tokenizer.to_str())
    added = [{key: value for key, value in each.items() if key != "special"} for each in found["added_tokens"]]
    return {"added_tokens": added} | {key: found[key] for key in ("normalizer", "pre_tokenizer", "model")}


def _shown(number: int | None) -> str:
    return "missing" if number is None else str(number)
