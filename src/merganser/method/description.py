"""A readable description of a merge method, from its signature and docstring."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .method import MergeMethod
    from .parameter import Parameter

__all__ = ["MethodDescription", "ParameterDescription", "citation", "describe"]

BIBLIOGRAPHY = Path(__file__).parents[3] / "references.bib"
"""Path of the bibliography in a checkout of the repository; an installed package has none."""


@dataclass(frozen=True, slots=True)
class ParameterDescription:
    """A parameter of a method.

    Args:
        name: Name in recipes.
        allowed: Allowed values, in words.
        per_model: Whether each model has its own value.
        required: Whether a recipe must give it.
        default: Value if a recipe gives none.
        help: What it does.
    """

    name: str
    allowed: str
    per_model: bool
    required: bool
    default: Any
    help: str


@dataclass(frozen=True, slots=True)
class MethodDescription:
    """A merge method.

    Args:
        name: Name in recipes.
        family: Group of methods.
        summary: One line.
        formula: How the result is computed.
        use_when: When it is a good choice.
        models: How many models it takes, in words.
        scope: What one call works on: "element", "row", "tensor" or "matrix".
        random: Whether the result depends on the seed.
        from_data: The statistics from data that it needs.
        from_data_of_base: Those that it needs of the base, on the data of every model.
        data_of: Of what it needs the former: "models" (every one), "base" or "first" (the first model).
        data_inputs: What computes the inputs that they are of, as in `FromData`: "own", "prefix" or "merged".
        sidecar: Whether it stores data for each model from which the model can be restored.
        parameters: Its parameters, in order.
        differs: Where it differs from the paper; empty if it does not.
        cite: Key in `references.bib`, "-" if nothing was published.
        citation: Authors, title and year; None without `references.bib`.
        breaks: Laws of the contract suite that do not hold for this method, each with the reason.
        no_effect: Parameters that are accepted only for compatibility with mergekit, each with the reason.
        version: Raised when results change.
    """

    name: str
    family: str
    summary: str
    formula: str
    use_when: str
    models: str
    scope: str
    random: bool
    from_data: Sequence[str]
    from_data_of_base: Sequence[str]
    data_of: str
    data_inputs: str
    sidecar: bool
    parameters: Sequence[ParameterDescription]
    differs: str
    cite: str
    citation: str | None
    breaks: Mapping[str, str]
    no_effect: Mapping[str, str]
    version: int


def describe(method: MergeMethod) -> MethodDescription:
    """Describe a method."""
    return MethodDescription(
        name=method.name,
        family=method.family,
        summary=method.doc.summary,
        formula=method.doc.body,
        use_when=method.doc.sections.get("Use when", ""),
        models=method.models_text(),
        scope=method.scope,
        random=method.random,
        from_data=_from_data(method, of_base=False),
        from_data_of_base=_from_data(method, of_base=True),
        data_of=method.data_of,
        data_inputs=method.data_inputs,
        sidecar=method.sidecar is not None,
        parameters=[_parameter(parameter) for parameter in method.parameters.values()],
        differs=method.doc.sections.get("Differs from the paper", ""),
        cite=method.cite,
        citation=citation(method.cite),
        breaks={str(law): reason for law, reason in method.breaks.items()},
        no_effect=dict(method.ignored),
        version=method.version,
    )


def _from_data(method: MergeMethod, *, of_base: bool) -> list[str]:
    found: list[str] = [own.statistic for own in method.from_data.values() if (own.of == "base_on_models") == of_base]
    if not of_base:
        found += [own.statistic for own in method.numbers.values() if not own.optional]
    return list(dict.fromkeys(found))


def _parameter(parameter: Parameter) -> ParameterDescription:
    return ParameterDescription(
        name=parameter.name,
        allowed=parameter.allowed,
        per_model=parameter.per_model,
        required=parameter.required,
        default=parameter.default,
        help=parameter.help,
    )


def citation(key: str, bibliography: Path = BIBLIOGRAPHY) -> str | None:
    """Return authors, title and year of an entry of a BibTeX file; None if there is no such entry or file."""
    if not bibliography.is_file():
        return None
    text = bibliography.read_text(encoding="utf-8")
    start = re.search(rf"^@\w+\{{\s*{re.escape(key)}\s*,", text, re.MULTILINE)
    if start is None:
        return None
    entry = text[start.end() :].partition("\n@")[0]
    authors = re.split(r"\s+and\s+", _field(entry, "author") or "")
    names = authors[0] + (" et al." if len(authors) > 2 else f" and {authors[1]}" if len(authors) == 2 else "")
    return ", ".join(filter(None, [names, _field(entry, "title"), _field(entry, "year")])) or None


def _field(entry: str, name: str) -> str | None:
    """Return a field of a BibTeX entry on one line, without the braces that protect capital letters."""
    start = re.search(rf"^\s*{name}\s*=\s*([{{\"]?)", entry, re.MULTILINE | re.IGNORECASE)
    if start is None:
        return None
    depth, value = 0, ""
    for letter in entry[start.end() :]:
        if depth == 0 and letter in ('}"' if start[1] else ",\n}"):
            break
        depth += {"{": 1, "}": -1}.get(letter, 0)
        value += letter
    return " ".join(value.replace("{", "").replace("}", "").split())
