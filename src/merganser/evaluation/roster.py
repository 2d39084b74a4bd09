"""The models of an evaluation, with their names and roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import TaskError, did_you_mean
from ..inference.sources import Reference, split_name
from ..jsonfile import exists
from ..recipe import Recipe, load_recipe
from ..wording import default_names

Role = Literal["base", "expert", "model"]
Models = Sequence[Reference] | Mapping[str, Reference]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of an evaluation.

    Args:
        name: Short, unique name.
        reference: The reference as the user wrote it, or a loaded recipe.
        role: "base", "expert" or "model".
    """

    name: str
    reference: Reference
    role: Role


@dataclass(frozen=True, slots=True)
class Roster:
    """The models of an evaluation.

    Args:
        entries: The base, the experts, the others, without duplicates.
        base: Name of the base.
        experts: Name of the expert for each domain (the name of a task).
    """

    entries: tuple[Entry, ...]
    base: str | None
    experts: Mapping[str, str]

    def names_of(self, measured: Sequence[str]) -> dict[str, list[str]]:
        """Return for each measured task the names that the task of a merge may have that belongs to it.

        That is its own name, and those of its expert: the name here, and the last part of its path.
        """
        references = {entry.name: entry.reference for entry in self.entries}
        found = {task: [task] for task in measured}
        for domain, expert in self.experts.items():
            found[domain] += [expert, *default_names([_text(references[expert])])]
        return found


def make_roster(
    models: Models,
    base: Reference | None,
    experts: Mapping[str, Reference] | Sequence[str],
    tasks: Sequence[str],
) -> Roster:
    """Collect the models of an evaluation and give each a name.

    Args:
        models: References, or `NAME=REFERENCE`, or a mapping from names.
        base: The base of the models.
        experts: A mapping from domain to the model that was trained for it, or a list of `DOMAIN=REFERENCE`.
        tasks: Names of the tasks; every domain must be one of them.

    Raises:
        TaskError: A domain is not a task, there are experts but no base, or two models have the same name.
    """
    given: list[tuple[str | None, Reference, Role]] = []
    if base is not None:
        given.append((*_pair(base), "base"))
    by_domain = _domains(experts, tasks)
    if by_domain and base is None:
        raise TaskError("experts: need a base (--base): gains of experts are measured from it")
    given += [(*_pair(reference), "expert") for reference in by_domain.values()]
    given += [(name, reference, "model") for name, reference in _pairs(models)]
    if not given:
        raise TaskError("models: none given; name at least one checkpoint, adapter or recipe")
    entries: dict[str, tuple[str | None, Reference, Role]] = {}
    for name, reference, role in given:
        known = entries.setdefault(_identity(reference), (name, reference, role))
        if name is not None and known[0] is None:
            entries[_identity(reference)] = (name, *known[1:])
        elif name is not None and known[0] != name:
            raise TaskError(f"models: {reference} is named both {known[0]!r} and {name!r}")
    named = _names(entries)
    return Roster(
        tuple(Entry(named[key], reference, role) for key, (_, reference, role) in entries.items()),
        None if base is None else named[_identity(_pair(base)[1])],
        {domain: named[_identity(_pair(reference)[1])] for domain, reference in by_domain.items()},
    )


def _names(entries: Mapping[str, tuple[str | None, Reference, Role]]) -> dict[str, str]:
    unnamed = [key for key, (name, _, _) in entries.items() if name is None]
    texts = [_text(entries[key][1]) for key in unnamed]
    names = dict(zip(unnamed, default_names(texts), strict=True))
    names |= {key: name for key, (name, _, _) in entries.items() if name is not None}
    twice = next((name for name in names.values() if list(names.values()).count(name) > 1), None)
    if twice is not None:
        raise TaskError(f"models: two are named {twice!r}; give names of your own: NAME=MODEL")
    return names


def _domains(experts: Mapping[str, Reference] | Sequence[str], tasks: Sequence[str]) -> dict[str, Reference]:
    experts_by_domain: dict[str, Reference] = {}
    for domain, reference in experts.items() if isinstance(experts, Mapping) else map(split_name, experts):
        if domain is None:
            raise TaskError(f"experts: expected DOMAIN=MODEL, got {str(reference)!r}; a domain is the name of a task")
        if domain not in tasks:
            raise TaskError(
                f"experts: {domain!r} is not a task.{did_you_mean(domain, tasks)} Tasks here: {', '.join(tasks)}"
            )
        if domain in experts_by_domain:
            raise TaskError(f"experts: {domain!r} has two, {experts_by_domain[domain]} and {reference}; give one")
        experts_by_domain[domain] = reference
    return experts_by_domain


def _pairs(models: Models) -> list[tuple[str | None, Reference]]:
    if isinstance(models, Mapping):
        if "merge_method" in models:
            raise TaskError("models: got one recipe; give a list of models, [recipe], or a mapping of names to models")
        return [(name, _loaded(model)) for name, model in models.items()]
    return [_pair(model) for model in models]


def _pair(reference: Reference) -> tuple[str | None, Reference]:
    return split_name(reference) if isinstance(reference, str) else (None, _loaded(reference))


def _loaded(reference: Reference) -> Reference:
    """Return a recipe that was given as a mapping, loaded; a mapping has no identity to compare models by."""
    return load_recipe(reference) if isinstance(reference, Mapping) else reference


def _identity(reference: Reference) -> str:
    """Return a key that is equal for different spellings of one path."""
    if isinstance(reference, Recipe):
        return f"recipe {id(reference)}"
    path = Path(str(reference))
    return str(path.expanduser().resolve()) if exists(path) else str(reference)


def _text(reference: Reference) -> str:
    return (reference.name or "recipe") if isinstance(reference, Recipe) else str(reference)
