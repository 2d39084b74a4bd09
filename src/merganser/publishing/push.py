"""Plan what is uploaded of an output, and upload it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files.sidefiles import is_side_file
from ..checkpoint.files.weights import is_weight_file
from ..errors import CheckpointError, OutputError, ParameterError
from ..jsonfile import read_object
from ..record import verify
from ..record.format import RECORD_NAME, record_text
from ..wording import some
from . import hub
from .card import published_card
from .licences import InputLicence, common_licence, input_licences
from .places import changed_texts, hide, places_in

__all__ = ["Push", "PushedFile", "plan_push", "push"]

CARD = "README.md"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}", re.ASCII)


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file to upload."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Push:
    """What would be uploaded.

    Args:
        out: The output.
        repo: The repository.
        files: The files, the card and the run record among them.
        left: Files of the folder that the merge did not write; they stay here.
        card: The text of the card.
        record: The text of the run record, with the hashes of the card and of the other changed files.
        changed: Contents of other files that are uploaded without paths of this machine.
        licence: The licence that it states; None if it states none.
        licences: The inputs with their licences.
        warnings: What to think about before.
    """

    out: Path
    repo: str
    files: Sequence[PushedFile]
    left: Sequence[str]
    card: str
    record: str
    changed: Mapping[str, bytes]
    licence: str | None
    licences: Sequence[InputLicence]
    warnings: Sequence[str]


def plan_push(
    out: str | Path,
    repo: str,
    *,
    licence: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Push:
    """Check an output, and say what would be uploaded; nothing is.

    Args:
        out: Folder that merganser wrote.
        repo: Model repository, as in `owner/name`.
        licence: The output's licence, as the Hub names it; None for the one that all inputs have, if they do.
        progress: Called with the number of bytes verified so far and in total.

    Raises:
        ParameterError: `repo` or `licence` is not a valid name.
        NotFoundError: There is no such output.
        CheckpointError: The output is not as it was written.
    """
    out = Path(out)
    if not _REPO.fullmatch(repo):
        raise ParameterError(f"push: REPO must be the id of a model repository, as in owner/name, got {repo!r}")
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ParameterError(f"push: --license must be an id of the Hub, such as apache-2.0, got {licence!r}")
    checked = verify(out, progress=progress)
    if not checked.ok:
        wrong = [file.file for file in checked.files if file.problem is not None] + list(checked.extra)
        raise CheckpointError(
            f"{out}: {some(wrong, 3)}: not as the merge wrote it; `merganser verify {out}` says what is different"
        )
    record = read_object(out / RECORD_NAME)
    licences = input_licences(record)
    licence = licence or common_licence(licences)
    written = {each.file: each.bytes for each in checked.files if each.file != CARD}
    places = places_in(out, written, record)
    hidden = hide(places)
    changed = changed_texts(out, written, hidden)
    card = hidden(published_card(_card(out), licences, licence))
    text = hidden(record_text(_with_changes(record, {CARD: card.encode(), **changed})))
    sizes = {CARD: len(card.encode()), **written, **{name: len(data) for name, data in changed.items()}}
    files = [PushedFile(name, size) for name, size in sizes.items()]
    return Push(
        out=out,
        repo=repo,
        files=[*files, PushedFile(RECORD_NAME, len(text.encode()))],
        left=[name for name in checked.beside if name != CARD],
        card=card,
        record=text,
        changed=changed,
        licence=licence,
        licences=licences,
        warnings=_warnings(places, licences, licence),
    )


def push(planned: Push, *, private: bool = True) -> str:
    """Upload an output in one commit.

    Args:
        planned: From `plan_push`.
        private: Whether a repository that is created is private; one that exists is left as it is.

    Returns:
        The address of the commit.

    Raises:
        OutputError: The repository holds files that would be loaded beside these, or the Hub refused.
    """
    present = hub.repository_files(planned.repo) or []
    ours = {file.name for file in planned.files}
    others = [name for name in present if name not in ours and _is_loaded(name)]
    if others:
        raise OutputError(
            f"{planned.repo}: holds {some(others, 3)}, which programs would load beside the files of {planned.out}; remove "
            "them on the Hub, or choose another repository"
        )
    data: dict[str, Path | bytes] = {file.name: planned.out / file.name for file in planned.files}
    data |= {CARD: planned.card.encode(), RECORD_NAME: planned.record.encode(), **planned.changed}
    return hub.upload(planned.repo, data, private=private, message=f"Upload {planned.out.resolve().name}")


def _with_changes(record: Mapping[str, Any], changed: Mapping[str, bytes]) -> dict[str, Any]:
    """Return a run record with other contents of some files, so that what is downloaded can be verified."""
    outputs = [each for each in record["outputs"] if each["file"] not in changed]
    entries = [
        {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in changed.items()
    ]
    return {**record, "outputs": [*outputs, *entries]}


def _is_loaded(name: str) -> bool:
    return is_weight_file(name) or is_side_file(name) or name.endswith((".index.json", "config.json"))


def _card(out: Path) -> str:
    try:
        return (out / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return f"# {out.resolve().name}\n"


def _warnings(places: Sequence[str], licences: Sequence[InputLicence], licence: str | None) -> list[str]:
    found = []
    unknown = [each.model for each in licences if each.licence is None]
    if unknown:
        found.append(
            f"the licence of {some(unknown, 3)} is not known: find out whether it allows a merge to be published"
        )
    stated = sorted({each.licence for each in licences if each.licence is not None})
    if len(stated) > 1:
        found.append(f"the inputs have different licences ({some(stated, 5)}): all of their terms apply to the merge")
    if licence is None:
        found.append("the card states no licence; give one with --license")
    if places:
        found.append(
            f"the files name paths of this machine, such as {places[0]}; the uploaded ones have only their last parts"
        )
    return found
