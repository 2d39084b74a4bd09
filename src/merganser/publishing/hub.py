"""The calls to the Hub: the only place that knows the library's client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError
from ..jsonfile import os_reason

__all__ = ["make_api", "model_licence", "repository_files", "upload"]

_TIMEOUT_SECONDS = 10.0


def make_api() -> Any:
    """Return the client of huggingface_hub; tests put another one in its place."""
    from huggingface_hub import HfApi

    return HfApi()


def model_licence(model: str, revision: str | None) -> str | None:
    """Return the licence that a model's page on the Hub states.

    Raises:
        CheckpointError: The Hub cannot be asked; the message says why.
    """
    try:
        info = make_api().model_info(model, revision=revision, timeout=_TIMEOUT_SECONDS)
    except Exception as error:
        raise CheckpointError(f"the Hub could not be asked: {_reason(error)}") from None
    tags = [tag for tag in getattr(info, "tags", None) or () if isinstance(tag, str)]
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)


def repository_files(repo: str) -> list[str] | None:
    """Return the files of a model repository; None if it does not exist, or is not visible to this user.

    Raises:
        OutputError: The Hub cannot be asked.
    """
    api = make_api()
    try:
        return list(api.list_repo_files(repo)) if api.repo_exists(repo) else None
    except Exception as error:
        raise OutputError(f"{repo}: the Hub could not be asked: {_reason(error)}") from None


def upload(repo: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Create the repository if it is not there, and add all files in one commit.

    Args:
        repo: Its id, as in `owner/name`.
        files: What to add, by the path in the repository.
        private: Whether a repository that is created is private.
        message: Message of the commit.

    Returns:
        The address of the commit.

    Raises:
        OutputError: The Hub refused or could not be reached; nothing was committed then.
    """
    from huggingface_hub import CommitOperationAdd

    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(data) if isinstance(data, Path) else data)
        for name, data in files.items()
    ]
    api = make_api()
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        found = api.create_commit(repo, operations, commit_message=message, repo_type="model")
    except Exception as error:
        raise OutputError(f"{repo}: not uploaded: {_reason(error)}") from None
    return str(getattr(found, "commit_url", repo))


def _reason(error: Exception) -> str:
    """Return what went wrong, without the library's message, which may hold signed addresses."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return "nobody is logged in here; run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return "access is restricted; accept the terms on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private (then run `hf auth login`)"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        hint = "; run `hf auth login` with a token that may write" if status in (401, 403) else ""
        return f"it answered with status {status}{hint}"
    if isinstance(error, errors.HFValidationError):
        return "this is not a valid id"
    return os_reason(error) if isinstance(error, OSError) else type(error).__name__
