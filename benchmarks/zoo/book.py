"""zoo.json: what a zoo holds, how each model was made, and which of them need not be made again."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .sources import sha256

FORMAT = 1


def settings_hash(settings: dict[str, Any]) -> str:
    """Hash of a settings tree; equal settings give equal hashes whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


class Book:
    """The record of one zoo, written anew after each finished model."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._path = folder / "zoo.json"
        self.content: dict[str, Any] = {"format": FORMAT, "zoo": name, "models": {}}
        if self._path.exists():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found.get("format") == FORMAT and found.get("zoo") == name:
                self.content = found

    def finished(self, model: str, settings: dict[str, Any]) -> bool:
        """Whether this model was made with just these settings and its files are unchanged."""
        entry = self.content["models"].get(model)
        if entry is None or entry["settings_sha256"] != settings_hash(settings):
            return False
        files = {name: self.folder / model / name for name in entry["files"]}
        return all(path.is_file() and sha256(path) == entry["files"][name] for name, path in files.items())

    def add(self, model: str, settings: dict[str, Any], measured: dict[str, Any]) -> None:
        """Record a finished model, with the hash of each of its files."""
        files = sorted(path for path in (self.folder / model).iterdir() if path.is_file())
        self.content["models"][model] = {
            "settings": settings,
            "settings_sha256": settings_hash(settings),
            "files": {path.name: sha256(path) for path in files},
            **measured,
        }
        self.save()

    def save(self) -> None:
        """Write zoo.json; a reader sees the old or the new file, never a part."""
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self._path)


@contextmanager
def appears_whole(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the name `target` only when the block ends well."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)
