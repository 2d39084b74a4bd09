"""Open a model that may have an adapter on top: `path[@revision][+adapter[@revision]]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint import folder as checkpoints
from ..checkpoint.hub import is_hub_id
from ..errors import MergeError
from ..jsonfile import exists
from .adapter import open_adapter
from .apply import with_adapter

if TYPE_CHECKING:
    from ..recipe import ModelReference, Place

__all__ = ["open_model", "open_named", "open_reference", "published_name", "split_reference"]


def open_model(
    model: str,
    adapter: str | None = None,
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    cache_dir: Path | None = None,
    stream: bool = False,
) -> Checkpoint:
    """Open a model from its headers, with an adapter if one is given.

    Args:
        model: A folder, a weight file, or a Hub id.
        adapter: A folder or a Hub id.
        revision: Revision of the model on the Hub.
        adapter_revision: Revision of the adapter on the Hub.
        cache_dir: Folder for files from the Hub.
        stream: Read the model's weights from the Hub by ranges; an adapter is fetched.

    Raises:
        NotFoundError: One of them does not exist.
        CheckpointError: One of them is damaged, or they do not fit each other.
        UnsupportedError: The adapter is of a kind that cannot be read here.
    """
    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir, stream=stream)
    if adapter is None:
        return checkpoint
    opened = open_adapter(adapter, revision=adapter_revision, cache_dir=cache_dir)
    return with_adapter(checkpoint, opened, f"{model}@{revision}" if revision else model)


def split_reference(text: str) -> tuple[str, str | None]:
    """Split `MODEL+ADAPTER`; the adapter is None if there is none, or if the whole text is an existing path."""
    if exists(text):
        return text, None
    model, plus, adapter = text.rpartition("+")
    return (model, adapter) if plus and model and adapter else (text, None)


def published_name(text: str) -> str:
    """Return a name for a model that says nothing of this machine: of a path the last part, and the id of a Hub model."""
    parts = [part for part in split_reference(text) if part is not None]
    paths = [Path(part).expanduser() for part in parts]
    # of OUT#TASK only OUT exists
    local = [path.is_absolute() or exists(path) for path in paths]
    return "+".join(path.resolve().name if own else part for part, path, own in zip(parts, paths, local, strict=True))


def open_reference(text: str, *, cache_dir: Path | None = None, stream: bool = False) -> Checkpoint:
    """Open a model by what a user writes: `path[@revision][+adapter[@revision]]`.

    Raises:
        MergeError: As for `open_model`.
    """
    model, adapter = split_reference(text)
    checkpoint = checkpoints.open_reference(model, cache_dir=cache_dir, stream=stream)
    if adapter is None:
        return checkpoint
    path, at, revision = adapter.rpartition("@")
    named = bool(at and revision) and is_hub_id(path) and not exists(adapter)
    opened = open_adapter(path if named else adapter, revision=revision if named else None, cache_dir=cache_dir)
    return with_adapter(checkpoint, opened, model)


def open_named(
    reference: ModelReference, place: Place | str, cache_dir: Path | None = None, *, stream: bool = False
) -> Checkpoint:
    """Open a checkpoint, with its adapter if it has one.

    Args:
        reference: The model.
        place: The place in the recipe that names it; errors begin with it.
        cache_dir: Folder for models from the Hub; None for that of huggingface_hub.
        stream: Whether files of the Hub are read by ranges, without being stored.

    Raises:
        MergeError: It is missing or damaged, or the adapter does not fit.
    """
    try:
        return open_model(
            reference.path,
            reference.lora,
            revision=reference.revision,
            adapter_revision=reference.lora_revision,
            cache_dir=cache_dir,
            stream=stream,
        )
    except MergeError as error:
        raise type(error)(f"{place}: {error}") from None
