"""Fetch ranges of files of the Hub, by the HTTP client of huggingface_hub, which knows tokens, redirects and proxies."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from ...errors import CheckpointError, MergeError, NotFoundError, UnreachableError, UnsupportedError
from ..hub import is_network, refuse
from .file import RemoteFile

__all__ = ["Fetcher", "open_remote"]

_TRIES = 5
"""How often a range is asked for again before the run gives up; counted again from 0 whenever bytes arrive."""

_WAIT, _LONGEST_WAIT = 1.0, 8.0
"""Seconds before the first new try, and the most; each wait is twice the one before."""

_BUSY = (408, 429, 500, 502, 503, 504)
"""Statuses after which a server may answer later."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# servers of contents may have ETags of their own: those of each file that the Hub has confirmed
_confirmed: set[tuple[RemoteFile, str]] = set()
_log = logging.getLogger("merganser")
_Found = TypeVar("_Found")


def open_remote(model: str, commit: str, name: str) -> RemoteFile:
    """Ask the Hub for the size of a file, and for what tells its contents from others.

    Args:
        model: Id of the model.
        commit: The commit.
        name: Path of the file in the repository.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: Access is refused, or the answer does not say what is needed.
        UnreachableError: The Hub does not answer.
        UnsupportedError: huggingface_hub is too old.
    """
    _require_streams()
    found = _ask(model, commit, name)
    if not found.size or not found.etag:
        raise CheckpointError(
            f"model {model!r}: {name}: the Hub states no {'size' if not found.size else 'ETag'} of the file, so it cannot be read "
            "by ranges; leave --stream out"
        )
    return RemoteFile(model, commit, name, int(found.size), str(found.etag))


class Fetcher:
    """Reads ranges of files, and notices when a file changes between two reads; safe to use from many threads."""

    def fetch(self, file: RemoteFile, start: int, target: memoryview) -> None:
        """Fill `target` with bytes of a file, from byte `start` on; a connection that breaks is opened again.

        Raises:
            CheckpointError: The file was changed or removed, access is refused, or the server does not send ranges.
            UnreachableError: The connection broke, and did not come back.
        """
        done, tries, wait = 0, 0, _WAIT
        while done < len(target):
            before = done
            try:
                for part in self._parts(file, start + done, start + len(target)):
                    target[done : done + len(part)] = part
                    done += len(part)
                problem = "the answer ended early"
            except Exception as error:
                if not is_network(error):
                    _refuse_file(file.model, file.commit, file.name, error)
                problem = type(error).__name__
            if done == len(target):
                return
            tries, wait = (1, _WAIT) if done > before else (tries + 1, wait)
            if tries > _TRIES:
                _give_up(str(file), problem, f"byte {start + done:,} of {file.size:,}")
            _log.warning("%s: %s at byte %s; asking again in %g s", file, problem, f"{start + done:,}", wait)
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _parts(self, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of a range as they arrive; fewer if the answer ends early, never more."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub import utils as hub_utils

        utils: Any = hub_utils  # which exports its names lazily

        # compressed answers have other ranges
        headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(file.model, file.name, revision=file.commit)
        with utils.http_stream_backoff(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            base_wait_time=_WAIT,
            max_wait_time=_LONGEST_WAIT,
            max_retries=_TRIES,
            retry_on_exceptions=(),
            retry_on_status_codes=_BUSY,
        ) as response:
            if response.status_code == 416:
                raise _changed(file, f"it has no byte {start:,} any more")
            utils.hf_raise_for_status(response)
            left = self._check(file, start, end, response)
            for part in response.iter_bytes():
                if len(part) > left:
                    raise CheckpointError(
                        f"{file}: the server sent more than the range that was asked for; leave --stream out"
                    )
                left -= len(part)
                yield part

    def _check(self, file: RemoteFile, start: int, end: int, response: Any) -> int:
        """Check that an answer holds the beginning of a range of the file; return how many bytes it has."""
        given = response.headers.get("Content-Range")
        if response.status_code == 200 and given is None and (start, end) == (0, file.size):
            length = response.headers.get("Content-Length")
            if length is not None and length != str(file.size):
                raise _changed(file, f"it has {length} bytes now, and had {file.size:,}")
            self._confirm(file, response.headers.get("ETag"))
            return end
        if response.status_code != 206:
            raise UnsupportedError(
                f"{file}: the server ignores the range that is asked for (it answers with status {response.status_code} and the "
                "whole file), so the file cannot be read by ranges; leave --stream out"
            )
        match = _RANGE.fullmatch(given or "")
        if match is None or int(match[1]) != start or not start <= int(match[2]) < end:
            raise CheckpointError(
                f"{file}: the server answered with another range than bytes {start:,} to {end - 1:,}: Content-Range {given!r:.80}"
            )
        if match[3] not in ("*", str(file.size)):
            raise _changed(file, f"it has {match[3]} bytes now, and had {file.size:,}")
        self._confirm(file, response.headers.get("ETag"))
        return int(match[2]) + 1 - start

    def _confirm(self, file: RemoteFile, etag: str | None) -> None:
        """Check that an answer is of the same contents as the header; the Hub is asked about an ETag that is not its own."""
        if etag is None:
            return
        plain = etag.removeprefix("W/").strip('"')
        if plain == file.etag or (file, plain) in _confirmed:
            return
        now = _ask(file.model, file.commit, file.name)
        if (now.etag, now.size) != (file.etag, file.size):
            raise _changed(file, "its contents are others now")
        _confirmed.add((file, plain))


def _ask(model: str, commit: str, name: str) -> Any:
    """Return what the Hub says of a file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    def ask() -> Any:
        return get_hf_file_metadata(hf_hub_url(model, name, revision=commit))

    return _retried(model, commit, name, ask)


def _retried(model: str, commit: str, name: str, ask: Callable[[], _Found]) -> _Found:
    wait = _WAIT
    for number in range(_TRIES + 1):
        try:
            return ask()
        except Exception as error:
            status = _status(error)
            if status not in _BUSY and not is_network(error):
                _refuse_file(model, commit, name, error)
            problem = type(error).__name__ if status is None else f"status {status}"
        if number < _TRIES:
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
    _give_up(f"model {model!r}: {name}", problem, "its size")


def _status(error: Exception) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _give_up(file: str, problem: str, what: str) -> NoReturn:
    raise UnreachableError(
        f"{file}: the Hub did not give {what} in {_TRIES + 1} tries ({problem}); run the same command again: a merge "
        "continues where it was"
    )


def _refuse_file(model: str, commit: str, name: str, error: Exception) -> NoReturn:
    """Raise our own error for an answer of the Hub about a file."""
    from huggingface_hub import errors

    if isinstance(error, MergeError):
        raise error
    if (status := _status(error)) in _BUSY:
        _give_up(f"model {model!r}: {name}", f"status {status}", "it")
    if isinstance(error, errors.EntryNotFoundError):
        raise NotFoundError(f"model {model!r}: {name}: the Hub has no such file at commit {commit[:12]}") from None
    refuse(model, commit, error)


def _changed(file: RemoteFile, how: str) -> CheckpointError:
    return CheckpointError(f"{file}: was changed on the Hub while it was read ({how}); run the command again")


def _require_streams() -> None:
    try:
        from huggingface_hub.utils import http_stream_backoff  # type: ignore[attr-defined]  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "--stream needs huggingface_hub 1.0 or later; update it: pip install -U huggingface_hub"
        ) from None
