"""Make generation stop: the output's configs list the end tokens of its tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...anatomy.settings.config import as_int
from ...errors import CheckpointError
from ...jsonfile import read_object
from ...tokenizer.ending import end_token, turn_ends
from ...tokenizer.vocabulary import Vocabulary, read_vocabulary
from ...wording import some
from ..alignment.alignment import Member
from ..vocabulary.special_ids import renumbered
from ..vocabulary.tokens import tokenizer_files
from .side_files import read_chat_template

__all__ = ["Ending", "agree_on_ending"]

GENERATION_CONFIG = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_END = "eos_token_id"
_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Ending:
    """The output's configs with all its end tokens, and warnings about the changes.

    Args:
        config: config.json.
        generation_config: generation_config.json; None if the donor's is copied, or none is needed.
        warnings: What was changed, and what could not be checked.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    warnings: list[str]


def agree_on_ending(
    donor: Member,
    owner: Member,
    config: dict[str, Any],
    template: str | None,
    vocabulary: Vocabulary | None = None,
    moved: Mapping[int, int | None] | None = None,
) -> Ending:
    """Add the end tokens of the output's tokenizer and chat template to its configs.

    The configs come from the donor. If the recipe takes the tokenizer from another model, or sets another chat
    template, these may end a turn with a token at which the donor's configs do not stop. Configs stay as they are for
    all other recipes.

    Args:
        donor: The model that gives the configs.
        owner: The model that gives the tokenizer.
        config: config.json of the output.
        template: The chat template that is set; None for that of the tokenizer.
        vocabulary: The output's vocabulary; None for that of the owner.
        moved: New ids of tokens in the donor's generation_config.json; None if all stay.
    """
    other = owner.reference != donor.reference
    if not config or not (other or template is not None):
        return Ending(config, None, [])
    try:
        own = _generation_config(donor)
        written = renumbered(own, moved) if moved else own
        generation = {**written, **_special_ids(_generation_config(owner))} if other else dict(own)
        files = tokenizer_files(owner.checkpoint)
        vocabulary = vocabulary or read_vocabulary(files)
        last = end_token(files)
        text = template if template is not None else read_chat_template(owner.checkpoint)
    except CheckpointError as error:
        return Ending(config, None, [f"{error}; so whether the output stops where its tokenizer ends was not checked"])
    if vocabulary is None:
        return Ending(config, None, [])
    result = {**config, **_special_ids(owner.checkpoint.config)} if other else dict(config)
    wanted, lacking = _ends(vocabulary, last, text)
    stops = _listed(generation.get(_END)) or _listed(result.get(_END))
    added = [number for number in wanted if number not in stops]
    if wanted and not set(_listed(result.get(_END))) & wanted.keys():
        result[_END] = next(iter(wanted))
    if added:
        generation |= {key: result[key] for key in _IDS if key in result and key not in generation}
        generation[_END] = [*stops, *added] if stops else added
    warnings = _said(owner, config, result, {n: wanted[n] for n in added}, lacking)
    return Ending(result, generation if generation != own else None, warnings)


def _generation_config(member: Member) -> dict[str, Any]:
    file = member.checkpoint.path / GENERATION_CONFIG
    return read_object(file) if file in member.checkpoint.side_files else {}


def _special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _IDS if config.get(key) is not None}


def _listed(value: Any) -> list[int]:
    """Return token ids that a config stores as an integer or a list of integers."""
    return [number for number in (value if isinstance(value, list) else [value]) if as_int(number) is not None]


def _ends(vocabulary: Vocabulary, last: str | None, template: str | None) -> tuple[dict[int, str], list[str]]:
    """Return the tokens that end a text or turn, by id, and end tokens of the template that the vocabulary lacks."""
    turns = turn_ends(template or "")
    found: dict[int, str] = {}
    for token in [*([last] if last else []), *turns]:
        number = vocabulary.id_of(token)
        if number is not None:
            found[number] = token
    known = set(found.values())
    return found, [] if known & set(turns) else turns


def _shown(value: Any) -> str:
    """Return a config value as JSON, shortened if it is long."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _said(
    owner: Member,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    added: Mapping[int, str],
    lacking: Sequence[str],
) -> list[str]:
    """Return warnings: what was changed, and which end of a turn is not a token."""
    warnings = []
    changed = [
        f"{key} is {_shown(after[key])}, not {_shown(before.get(key))}"
        for key in _IDS
        if after.get(key) != before.get(key)
    ]
    if changed:
        warnings.append(f"config.json: goes with the tokenizer of {owner.reference}: {some(changed)}")
    if added:
        tokens = some([f"{number} ({token!r})" for number, token in added.items()])
        warnings.append(
            f"{GENERATION_CONFIG}: {_END} gets {tokens}, with which the tokenizer of {owner.reference} or the chat "
            "template ends a text; otherwise the output would not stop"
        )
    if lacking:
        warnings.append(
            f"chat_template: ends turns with {some(list(map(repr, lacking)))}, which the tokenizer of "
            f"{owner.reference} has no token for, so that the output may not stop; take a template of its own models"
        )
    return warnings
