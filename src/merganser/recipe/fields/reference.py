"""References to models: which checkpoint, and which revision."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ...jsonfile import exists
from ..document.place import Entry
from ..document.scalar import CONTROL, shown

_SYNTAX = "path[@revision][+lora[@revision]]"
_KEYS = ("model", "lora", "override_architecture")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A checkpoint: a folder, or the id of a model on the Hub.

    A string that is an existing path is not split, even if it contains "@" or "+"; nor is `path` in a mapping, such as
    `{path: ./my+model}`.

    Args:
        path: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        lora: Folder or Hub id of an adapter on top.
        lora_revision: Revision of the adapter.
        override_architecture: Read from mergekit recipes; has no effect.
    """

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None
    override_architecture: str | None = None

    def __hash__(self) -> int:
        # references are keys of a mapping per tensor; a text keeps its hash
        return hash(self.path)

    def __str__(self) -> str:
        text = f"{self.path}@{self.revision}" if self.revision else self.path
        if self.lora:
            text += f"+{self.lora}@{self.lora_revision}" if self.lora_revision else f"+{self.lora}"
        return text

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders, Hub ids or names of stages that it stands for: the model, and an adapter if there is one."""
        return (self.path,) if self.lora is None else (self.path, self.lora)

    @classmethod
    def parse(cls, entry: Entry, stages: Collection[str] = ()) -> ModelReference:
        """Read a reference from a recipe.

        Args:
            entry: The reference.
            stages: Names of results that a recipe may use as models; they may contain "@" and "+".

        Raises:
            RecipeError: The entry is neither `path[@revision][+lora[@revision]]` nor a mapping of the same parts.
        """
        if not isinstance(entry.value, dict):
            text = _path(entry)
            if any(sign in text for sign in "@+") and (text in stages or exists(text)):
                return cls(text)
            path, plus, lora = text.partition("+")
            base = cls(*_split(path, entry))
            return cls(base.path, base.revision, *_split(lora, entry)) if plus else base
        # {path, revision} alone, or {model: ..., lora: ..., override_architecture}
        if "path" in entry.value:
            return cls(*_part(entry))
        fields = entry.mapping(_KEYS, required=["model"])
        lora_part = _part(fields["lora"]) if "lora" in fields else (None, None)
        architecture = fields["override_architecture"].text() if "override_architecture" in fields else None
        model = (
            cls(*_part(fields["model"]))
            if isinstance(fields["model"].value, dict)
            else cls.parse(fields["model"], stages)
        )
        if model.lora and lora_part[0]:
            raise entry.error(f"two adapters on one model, {model.lora} and {lora_part[0]}; name one")
        return cls(
            model.path,
            model.revision,
            model.lora or lora_part[0],
            model.lora_revision or lora_part[1],
            architecture,
        )

    def with_adapter(self, entry: Entry, stages: Collection[str] = ()) -> ModelReference:
        """Return the reference with an adapter on top.

        Args:
            entry: The adapter: `path[@revision]` or `{path, revision}`.
            stages: As for `parse`.

        Raises:
            RecipeError: The entry is neither, or the model has an adapter already.
        """
        if isinstance(entry.value, dict):
            path, revision = _part(entry)
        else:
            text = _path(entry)
            whole = any(sign in text for sign in "@+") and (text in stages or exists(text))
            path, revision = (text, None) if whole else _split(text, entry)
        if self.lora:
            raise entry.error(f"two adapters on one model, {self.lora} and {path}; name one")
        return replace(self, lora=path, lora_revision=revision)


def _part(entry: Entry) -> tuple[str, str | None]:
    """Read `path`, `path@revision`, or `{path, revision}`; the path of a mapping is not split."""
    if not isinstance(entry.value, dict):
        return _split(_path(entry), entry)
    fields = entry.mapping(("path", "revision"), required=["path"])
    return _path(fields["path"]), fields["revision"].text() if "revision" in fields else None


def _path(entry: Entry) -> str:
    text = entry.text()
    bad = CONTROL.search(text)
    if bad is not None:
        raise entry.error(
            f"{shown(text)} holds the character {shown(bad[0])}, which is not part of a path; in double quotes a backslash "
            "starts an escape: use single quotes, or '/'"
        )
    return text


def _split(text: str, entry: Entry) -> tuple[str, str | None]:
    path, at, revision = text.strip().partition("@")
    if not path or (at and not revision) or "+" in text or "@" in revision:
        raise entry.error(
            f"a model is written {_SYNTAX}, got {shown(entry.value)}; "
            "where a path itself has '@' or '+', write {path: ..., revision: ...}"
        )
    return path, revision or None
