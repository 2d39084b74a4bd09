"""Parse the docstring of a merge method into sections, from which help, documentation and schema are made."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"^(Use when|Args|Differs from the paper|References|Example):\s*$")
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*)$")


@dataclass(frozen=True, slots=True)
class Docstring:
    """The parts of a docstring.

    Args:
        summary: First line.
        body: Text between the first line and the first section; indented lines are formulas.
        sections: Text of each section by its heading, dedented.
        args: Help of each argument by its name.
    """

    summary: str
    body: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)


def parse_docstring(text: str) -> Docstring:
    """Split a docstring in Google style into its parts."""
    lines = inspect.cleandoc(text).splitlines()
    summary = lines[0] if lines else ""
    blocks: dict[str, list[str]] = {"": []}
    current = ""
    for line in lines[1:]:
        heading = _SECTION.match(line)
        if heading:
            current = heading[1]
            blocks[current] = []
        else:
            blocks[current].append(line)
    sections = {name: inspect.cleandoc("\n" + "\n".join(block)) for name, block in blocks.items() if name}
    args: dict[str, str] = {}
    name = ""
    for line in blocks.get("Args", []):
        argument = _ARGUMENT.match(line)
        if argument:
            name = argument[1]
            args[name] = argument[2]
        elif name and line.strip():
            args[name] += " " + line.strip()
    return Docstring(summary, "\n".join(blocks[""]).strip("\n"), sections, args)
