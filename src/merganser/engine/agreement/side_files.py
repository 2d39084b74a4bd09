"""Which files an output has beside weights and config, and whose they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ...checkpoint import Checkpoint
from ...checkpoint.sidefiles import is_tokenizer_file
from ...recipe import ModelReference, Recipe
from ...recipe.templates import AUTO
from ..alignment.alignment import Member


def side_files(recipe: Recipe, members: Mapping[ModelReference, Member]) -> dict[str, Path]:
    """Return the files to copy: the donor's, with the tokenizer of the model that the recipe names for it."""
    donor = members[recipe.donor].checkpoint
    files = {path.relative_to(donor.path).as_posix(): path for path in donor.side_files}
    other = recipe.tokenizer_donor
    if other is not None and other != recipe.donor:
        files = {name: path for name, path in files.items() if not is_tokenizer_file(name)}
        checkpoint = members[other].checkpoint
        for path in checkpoint.side_files:
            name = path.relative_to(checkpoint.path).as_posix()
            if is_tokenizer_file(name):
                files[name] = path
    return files


def code_warnings(donor: Member) -> list[str]:
    """Say which files of the donor are code."""
    code = [path.name for path in donor.checkpoint.side_files if path.suffix == ".py"]
    if not code:
        return []
    return [f"{', '.join(code)}: code that comes with {donor.reference}; it is copied, and was not run"]


def chat_template(recipe: Recipe, members: Mapping[ModelReference, Member]) -> tuple[str | None, list[str]]:
    """Return the chat template to write, and what the user should know of the choice.

    `auto` is the template that most models have; of equally frequent ones the first in the recipe's order.
    """
    if recipe.chat_template != AUTO:
        return recipe.chat_template, []
    found = {reference: read_chat_template(member.checkpoint) for reference, member in members.items()}
    counts = Counter(text for text in found.values() if text is not None)
    if not counts:
        return None, ["chat_template: auto: no model has a chat template, so the output has none"]
    # a Counter keeps the order of first appearance among equals
    chosen, count = counts.most_common(1)[0]
    first = next(reference for reference, text in found.items() if text == chosen)
    if len(counts) == 1:
        return chosen, []
    return chosen, [
        f"chat_template: auto: the models have {len(counts)} different ones; taken that of {first} ({count} have it)"
    ]


def read_chat_template(checkpoint: Checkpoint) -> str | None:
    """Return a checkpoint's chat template: its own file's, else the tokenizer config's; None without one."""
    own = checkpoint.path / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            content = json.loads((checkpoint.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        template = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            # several by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            if isinstance(named.get("default"), str):
                return str(named["default"])
    return None
