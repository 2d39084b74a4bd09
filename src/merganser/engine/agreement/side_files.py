"""Choose the files that an output gets besides weights and config, and the model each comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...checkpoint import Checkpoint
from ...checkpoint.files.sidefiles import is_tokenizer_file
from ...checkpoint.files.weights import is_weight_file
from ...errors import CheckpointError
from ...jsonfile import Entry, os_reason, read_file, read_object
from ...recipe import ModelReference, Recipe
from ...recipe.fields.templates import AUTO
from ...wording import some
from ..alignment.alignment import Member
from ..plan.sections.vocabulary import VocabularyChange

TEMPLATE = "chat_template.jinja"

_MAX_TEMPLATE_BYTES = 10_000_000


def side_files(donor: Member, owner: Member, change: VocabularyChange | None) -> dict[str, Path]:
    """Return the files to copy: the donor's, with the tokenizer files of another model where that gives the tokenizer.

    Args:
        donor: The model that gives config and other files.
        owner: The model that gives the tokenizer.
        change: Its files that do not hold all tokens of a changed vocabulary are left out.
    """
    files = _relative(donor.checkpoint)
    if owner is not donor and owner.reference != donor.reference:
        files = {name: path for name, path in files.items() if not is_tokenizer_file(name)}
        files |= {name: path for name, path in _relative(owner.checkpoint).items() if is_tokenizer_file(name)}
    return {name: path for name, path in files.items() if change is None or name not in change.stale}


RECIPE = "the recipe"
"""Origin of a chat template that the recipe holds."""


def file_origins(
    donor: Member,
    owner: Member,
    files: Mapping[str, Path],
    written: Sequence[str],
    template_of: str | None,
    change: VocabularyChange | None,
) -> dict[str, list[str]]:
    """Return the names of the output's files besides weights, by the model that gives them; the donor first.

    A file that is written anew, such as a config with another number of layers, counts as that of the model whose file was
    changed.

    Args:
        donor: As in `side_files`.
        owner: As in `side_files`.
        files: From `side_files`.
        written: Names of the configs of the donor that are written.
        template_of: The model whose chat template is written, or `RECIPE`; None if none is written.
        change: What is written in place of the tokenizer's files.
    """
    giver, tokens = str(donor.reference), str(owner.reference)
    found: dict[str, list[str]] = {giver: [*written]}
    named = [*files, *([] if change is None else change.texts)]
    for name in dict.fromkeys(named):
        if name not in written and (name != TEMPLATE or template_of is None):
            found.setdefault(tokens if is_tokenizer_file(name) else giver, []).append(name)
    if template_of is not None:
        found.setdefault(template_of, []).append(TEMPLATE)
    return {model: names for model, names in found.items() if names}


def _relative(checkpoint: Checkpoint) -> dict[str, Path]:
    return {path.relative_to(checkpoint.path).as_posix(): path for path in checkpoint.side_files}


def side_file_warnings(donor: Member) -> list[str]:
    """Return warnings about files copied from the donor that are code or hold weights."""
    names = [path.relative_to(donor.checkpoint.path).as_posix() for path in donor.checkpoint.side_files]
    warnings = []
    if code := [name for name in names if name.endswith(".py")]:
        warnings.append(f"{', '.join(code)}: code that comes with {donor.reference}; it is copied, and was not run")
    if weights := [name for name in names if is_weight_file(name)]:
        warnings.append(
            f"{', '.join(weights)}: weights of modules that follow the model; they are copied from {donor.reference}, not merged"
        )
    return warnings


def unread_warnings(members: Mapping[ModelReference, Member]) -> list[str]:
    """Return warnings about weight files in the models' folders that are not read."""
    return [
        f"{reference}: {some(member.checkpoint.unread)} may also hold weights; only "
        f"{some([file.name for file in member.checkpoint.weight_files])} is read"
        for reference, member in members.items()
        if member.checkpoint.unread
    ]


def chat_template(
    recipe: Recipe, members: Mapping[ModelReference, Member], owner: Member
) -> tuple[str | None, str | None, list[str]]:
    """Return the chat template to write, the model or `RECIPE` that has it, and warnings about the choice.

    `auto` is the template that most models have; of equally frequent ones, the first in the recipe's order. A union of
    tokenizers gets it, too, if the model whose tokenizer it extends has no template.
    """
    union = recipe.chat_template is None and recipe.tokenizer_union is not None
    if union and read_chat_template(owner.checkpoint) is None:
        if all(read_chat_template(member.checkpoint) is None for member in members.values()):
            return None, None, []
    elif recipe.chat_template != AUTO:
        return recipe.chat_template, None if recipe.chat_template is None else RECIPE, []
    found = {reference: read_chat_template(member.checkpoint) for reference, member in members.items()}
    counts = Counter(text for text in found.values() if text is not None)
    if not counts:
        return None, None, ["chat_template: auto: no model has a chat template, so the output has none"]
    # most_common keeps the order of first appearance among equal counts
    chosen, count = counts.most_common(1)[0]
    first = next(reference for reference, text in found.items() if text == chosen)
    if len(counts) == 1:
        return chosen, str(first), []
    return (
        chosen,
        str(first),
        [f"chat_template: auto: the models have {len(counts)} different ones; taken that of {first} ({count} have it)"],
    )


def read_chat_template(checkpoint: Checkpoint) -> str | None:
    """Return a checkpoint's chat template, from its template file or else its tokenizer config; None if it has none.

    Raises:
        CheckpointError: A file that may hold it cannot be read, is a link out of the checkpoint, or has no valid
            template.
    """
    own = checkpoint.side_file(TEMPLATE)
    if own is not None:
        return _checked(own, _read_text(own))
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = checkpoint.side_file(name)
        found = None if file is None else _template_in(Entry(read_object(file), str(file)))
        if file is not None and found is not None:
            return _checked(file, found)
    return None


def _template_in(content: Entry) -> str | None:
    """Return the template in a tokenizer config: a string, or the entry named "default" of a list."""
    entry = content.get("chat_template")
    if entry is None:
        return None
    if entry.is_list():
        named = {each["name"].text(): each["template"].text() for each in entry.each(lambda each: each)}
        return named.get("default")
    return entry.text()


def _read_text(file: Path) -> str:
    try:
        return read_file(file, _MAX_TEMPLATE_BYTES).decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8 text (byte {error.start})") from None


def _checked(file: Path, template: str) -> str:
    try:
        template.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{file}: chat_template: holds half of a surrogate pair, which is not text") from None
    return template
