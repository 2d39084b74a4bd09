"""`merganser schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from ._options import Json
from .printing.text import complain, say, say_json


def schema(
    contents: Annotated[
        bool, typer.Option("--print", help="Print the schema itself, with the methods of other installed packages.")
    ] = False,
    json: Json = False,
) -> None:
    """Print the path of the JSON schema of recipes, for editors."""
    from ..recipe.schema import SCHEMA_FILE, SCHEMA_ID

    if contents:
        from ..recipe.schema import json_schema

        say_json(json_schema())
        return
    line = f"# yaml-language-server: $schema={SCHEMA_FILE}"
    if json:
        say_json({"path": str(SCHEMA_FILE), "id": SCHEMA_ID, "line": line})
        return
    say(str(SCHEMA_FILE))
    complain("note", f"an editor with the YAML language server checks a recipe that has this line: {line}")
