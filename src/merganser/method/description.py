"""A readable description of a merge method, from its signature and docstring."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..catalogue import MethodDescription, ParameterDescription

if TYPE_CHECKING:
    from .method import MergeMethod
    from .parameter import Parameter

__all__ = ["MethodDescription", "ParameterDescription", "citation", "describe"]

BIBLIOGRAPHY = Path(__file__).parents[3] / "references.bib"
"""Path of the bibliography in a checkout of the repository; an installed package has none."""


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
        from_data=list(method.data_statistics(optional=False)),
        from_data_of_base=list(method.data_statistics(of_base=True)),
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
