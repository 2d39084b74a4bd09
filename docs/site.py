"""Hooks of MkDocs: the README becomes the first page, and links to files beside the documents become their names."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page."""
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(docs/", "](", readme)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links to files that are not part of the site, such as sources, by their text and name."""
    folder = posixpath.dirname(page.file.src_uri)

    def kept(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        if ":" in target or files.get_file_from_path(posixpath.normpath(posixpath.join(folder, target))):
            return match.group()
        name = posixpath.normpath(posixpath.join("docs", folder, target))
        return text if name in text or text.strip("`") == posixpath.basename(name) else f"{text} (`{name}`)"

    return _LINK.sub(kept, markdown)
