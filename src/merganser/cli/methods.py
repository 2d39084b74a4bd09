"""`merganser methods`."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from itertools import groupby
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..catalogue import FIRST, canonical_name, described, factor_names, own_names, third_party, unknown_method
from ..engine.fusion.machine import why_not
from ..errors import RecipeError
from ._options import Json
from .printing.text import head, say, say_json, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..catalogue import MethodDescription, ParameterDescription

_LAWS = {
    "identical": "identical models are not returned as they are",
    "zero_delta": "models equal to the base do not give the base",
    "order": "the order of the models matters",
    "differs": "the result may equal an input",
}
_SCOPES = {
    "element": "element by element",
    "row": "whole rows",
    "tensor": "whole tensors",
    "matrix": "whole matrices",
    "factors": "factors of adapters",
}


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One method, to read all about it.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List the merge methods, or explain one."""
    every = _descriptions()
    if name is not None:
        name = canonical_name(name)
        if name not in every:
            raise RecipeError(unknown_method(name))
        found, how = every[name], _passes(name)
        if json:
            say_json({**asdict(found), "passes": how})
        else:
            _page(found, how)
        return
    if json:
        say_json([asdict(method) for method in _by_family(every.values())])
        return
    _list(_by_family(every.values()))


def _descriptions() -> dict[str, MethodDescription]:
    """Return the description of every method; torch is imported only if one is not in the catalogue."""
    found, _ = described()
    missing = (own_names() | factor_names() | set(third_party())) - found.keys()
    if missing:
        from ..method.description import describe
        from ..method.registry import every_method

        every = every_method()
        found |= {name: describe(every[name]) for name in missing}
    return found


def _passes(name: str) -> list[dict[str, Any]]:
    _, passes_of = described()
    if name in passes_of:
        return passes_of[name]
    from ..method.registry import every_method
    from ..testing.passes import passes

    return [asdict(one) for one in passes(every_method()[name])]


def _by_family(every: Iterable[MethodDescription]) -> list[MethodDescription]:
    return sorted(every, key=lambda method: (method.family, method.name))


def _list(every: Sequence[MethodDescription]) -> None:
    width = max(len(method.name) for method in every)
    columns = get_terminal_size().columns
    head("Try first")
    for name, why in FIRST.items():
        text = textwrap.wrap(why, max(columns - width - 4, 20))
        for first, line in zip([name, *[""] * len(text)], text, strict=False):
            say(f"  {first:<{width}}  {line}")
    for family, members in groupby(every, key=lambda method: method.family):
        say()
        head(family)
        for method in members:
            say(_cut(f"  {method.name:<{width}}  {method.summary}", columns))
    say()
    say("merganser methods NAME explains one; --json has all of it. Which to choose and")
    say("why: docs/choosing-a-method.md. What each kept: docs/quality.md.")


def _cut(line: str, columns: int) -> str:
    """Return a line that fits into the terminal, cut at the end of a word."""
    return line if len(line) <= columns else f"{line[: columns - 1].rpartition(' ')[0]}…"


def _page(method: MethodDescription, how: Sequence[Mapping[str, Any]]) -> None:
    head(f"{method.name} · {method.family}")
    say(method.summary)
    _block("", method.formula)
    _block("Use when", method.use_when)
    random = "; the result depends on the seed" if method.random else ""
    of = {"models": "every model", "base": "the base", "first": "the first model"}[method.data_of]
    source = "`merganser calibrate`" if method.data_inputs == "own" else "measured within the merge"
    wanted = [f"{' and '.join(method.from_data)} of {of}"] if method.from_data else []
    if method.from_data_of_base:
        wanted.append(f"{' and '.join(method.from_data_of_base)} of the base on the data of every model")
    needed = f"; needs {', and '.join(wanted)} ({source})" if wanted else ""
    kept = "; keeps what restores each model (`merganser restore`)" if method.sidecar else ""
    _block("Takes", f"{method.models}; {_SCOPES[method.scope]}{needed}{random}{kept}")
    if method.parameters:
        say()
        head("Parameters")
        for parameter in method.parameters:
            _parameter(parameter)
    for name, reason in method.no_effect.items():
        _wrapped(f"{name}: accepted, without effect: {reason}", "  ")
    _block("Differs from the paper", method.differs)
    if method.breaks:
        say()
        head("Unlike other methods")
        for law, reason in method.breaks.items():
            _wrapped(f"{_LAWS.get(law, law)}: {reason}", "  ")
    say()
    head("Passes over the inputs")
    for one in how:
        _wrapped(f"{one['what']}: {_how(one)}", "  ")
    if any(one["fused"] for one in how) and why_not():
        _wrapped(f"here all run operation by operation ({why_not()})", "  ")
    cited = "no publication" if method.cite == "-" else method.cite
    _block("Reference", f"{method.citation} [{cited}]" if method.citation else cited)


def _how(found: Mapping[str, Any]) -> str:
    if not found["fused"]:
        return f"operation by operation ({found['reason']})"
    return "fused" + (f", with {', '.join(found['between'])} in between" if found["between"] else "")


def _parameter(parameter: ParameterDescription) -> None:
    per = "; one value per model" if parameter.per_model else ""
    default = "required" if parameter.required else f"default {_value(parameter.default)}"
    for line in table([[parameter.name, f"{parameter.allowed}{per}; {default}"]]):
        say(line)
    _wrapped(parameter.help, "      ")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _block(title: str, text: str) -> None:
    """Print a section; without a title it is a formula, whose lines keep their layout."""
    if not text:
        return
    say()
    if not title:
        for line in text.splitlines():
            say(line.rstrip())
        return
    head(title)
    for paragraph in _paragraphs(text):
        _wrapped(paragraph, "  ")


def _paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text as one line each; indented lines, such as formulas, stay lines of their own."""
    found: list[str] = []
    joins = False
    for line in text.splitlines():
        plain = bool(line) and not line[0].isspace()
        if joins and plain:
            found[-1] += f" {line}"
        else:
            found.append(line)
        joins = plain
    return found


def _wrapped(text: str, indent: str) -> None:
    width = min(get_terminal_size().columns, 100)
    own = text[: len(text) - len(text.lstrip())]
    for line in textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + own) or [""]:
        say(line)
