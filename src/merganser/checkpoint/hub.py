"""Models of the Hugging Face Hub: fetch only the files that a merge needs; without a network, use the cache."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import CheckpointError, NotFoundError, UnsupportedError
from ..jsonfile import os_reason, read_object
from .files.sidefiles import is_module_file, is_side_file, module_folders
from .files.weights import PICKLED_SUFFIXES, TRAINER_SUFFIX, Weights, choose_weights, is_weight_file

__all__ = ["Partial", "adapter_snapshot", "is_hub_id", "is_network", "partial_snapshot", "refuse", "snapshot"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_TIMEOUT_SECONDS = 10.0
_FILE_SUFFIXES = (".safetensors", ".gguf", ".json", *PICKLED_SUFFIXES, TRAINER_SUFFIX)


def is_hub_id(reference: str) -> bool:
    """Return whether a reference that is not an existing path can be the id of a model on the Hub."""
    return _HUB_ID.fullmatch(reference) is not None and not reference.endswith(_FILE_SUFFIXES)


def snapshot(model: str, *, revision: str | None, cache_dir: Path | None) -> Path:
    """Fetch the files of a Hub model that a merge needs, and return the folder that holds them.

    Without a network, or with `HF_HUB_OFFLINE=1`, the folder is the one in the cache.

    Raises:
        NotFoundError: the Hub has no such model or revision, or it is not in the cache and there is no network.
        CheckpointError: access is refused, or fetching failed.
    """
    listed = None if _offline() else _list_files(model, revision)
    if listed is None:
        return _cached(model, revision, cache_dir)
    names = listed.names
    weights = choose_weights(f"{model} on the Hub", names)
    folder = _fetch(model, revision, cache_dir, [*_beside(weights, names), *weights.files])
    # The folder is named after the commit, so all shards come from one commit even if the branch moves meanwhile.
    if shards := _shards(folder, weights, names):
        _fetch(model, folder.name, cache_dir, shards)
    _fetch_modules(model, folder, cache_dir, names)
    return folder


@dataclass(frozen=True, slots=True)
class Partial:
    """A model of the Hub without its weights.

    Args:
        folder: The folder of a commit, with all files that a merge needs but the weights; some of these may be there from
            before.
        commit: The commit.
        missing: Names of the weight files that are not in the folder.
    """

    folder: Path
    commit: str
    missing: tuple[str, ...]


def partial_snapshot(model: str, *, revision: str | None, cache_dir: Path | None) -> Partial:
    """Fetch the files of a Hub model that a merge needs, but for its weights, which are to be read by ranges.

    Raises:
        NotFoundError: As for `snapshot`.
        CheckpointError: As for `snapshot`.
        UnsupportedError: The weights are not safetensors.
    """
    listed = None if _offline() else _list_files(model, revision)
    if listed is None or listed.commit is None:
        folder = _cached(model, revision, cache_dir)
        return Partial(folder, folder.name, ())
    names, commit = listed.names, listed.commit
    weights = choose_weights(f"{model} on the Hub", names)
    folder = _fetch(model, commit, cache_dir, _beside(weights, names))
    # nothing is fetched of a model that has weights alone
    folder.mkdir(parents=True, exist_ok=True)
    files = [*weights.files, *_shards(folder, weights, names)]
    other = next((name for name in files if not name.endswith(".safetensors")), None)
    if other is not None:
        raise UnsupportedError(
            f"model {model!r}: {other} cannot be read by ranges, only safetensors can; leave --stream out"
        )
    _fetch_modules(model, folder, cache_dir, names)
    return Partial(folder, commit, tuple(name for name in files if not (folder / name).exists()))


def _beside(weights: Weights, names: Sequence[str]) -> list[str]:
    """Return the files beside the weights that a merge needs: config, tokenizer, indexes."""
    configs = [
        "config.json",
        *(["params.json"] if any(file.startswith("consolidated") for file in weights.files) else []),
    ]
    found = [name for name in names if name in configs or is_side_file(name)]
    return [*found, *(name for name in (weights.index, weights.rival) if name)]


def _shards(folder: Path, weights: Weights, names: Sequence[str]) -> list[str]:
    """Return the files that the index names; empty if there is none."""
    if weights.index is None:
        return []
    shards = read_object(folder / weights.index).get("weight_map")
    wanted = {file for file in shards.values() if isinstance(file, str)} if isinstance(shards, dict) else set()
    return sorted(wanted & set(names))


def _fetch_modules(model: str, folder: Path, cache_dir: Path | None, names: Sequence[str]) -> None:
    modules = module_folders(folder)
    if more := [name for name in names if is_module_file(name, modules)]:
        _fetch(model, folder.name, cache_dir, more)


def adapter_snapshot(adapter: str, wanted: Sequence[str], *, revision: str | None, cache_dir: Path | None) -> Path:
    """Fetch the files of an adapter on the Hub, and return the folder that holds them.

    Args:
        adapter: Its id.
        wanted: Names of the files; those that it does not have are left out, and of weights the first.
        revision: The branch, tag or commit.
        cache_dir: Folder for files from the Hub.

    Raises:
        NotFoundError: As for `snapshot`.
        CheckpointError: As for `snapshot`.
    """
    listed = None if _offline() else _list_files(adapter, revision)
    config, *weights = wanted
    if listed is None:
        return _cached(adapter, revision, cache_dir, config)
    return _fetch(adapter, revision, cache_dir, [config, *[name for name in weights if name in listed.names][:1]])


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True, slots=True)
class _Listed:
    """The files of a model, and the commit that they are of."""

    names: list[str]
    commit: str | None


def _list_files(model: str, revision: str | None) -> _Listed | None:
    """Return the names of the model's files, or None if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Not `list_repo_files`: without a network, that retries for half a minute.
        info = HfApi().model_info(model, revision=revision, timeout=_TIMEOUT_SECONDS)
        return _Listed([file.rfilename for file in info.siblings or ()], info.sha)
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return None
        refuse(model, revision, error)
    except Exception as error:
        if is_network(error):
            return None
        refuse(model, revision, error)


def _cached(model: str, revision: str | None, cache_dir: Path | None, config: str = "config.json") -> Path:
    from huggingface_hub import snapshot_download

    unreachable = "the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
    try:
        # Name one small file: huggingface_hub otherwise requires every file of the repository to be in the cache.
        found = snapshot_download(
            model, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=[config]
        )
    except FileNotFoundError:
        at = f" at revision {revision!r}" if revision else ""
        raise NotFoundError(
            f"model {model!r} not found: no such folder, the cache does not have it{at}, and {unreachable}"
        ) from None
    except Exception as error:
        refuse(model, revision, error)
    folder = Path(found)
    if not any(is_weight_file(path.name) for path in folder.iterdir()):
        raise NotFoundError(f"model {model!r}: the cache has no weights of it ({folder}), and {unreachable}")
    return folder


def _fetch(model: str, revision: str | None, cache_dir: Path | None, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, cache_dir=cache_dir, allow_patterns=[glob.escape(name) for name in names]
            )
        )
    except Exception as error:
        refuse(model, revision, error)


def is_network(error: Exception) -> bool:
    """Return whether an error is that of a connection, so that another try may help."""
    # Recognise errors by module: huggingface_hub has changed its HTTP library more than once.
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "requests",
        "urllib3",
    )


def refuse(model: str, revision: str | None, error: Exception) -> NoReturn:
    """Raise our own error, without the library's message, which contains signed URLs."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise CheckpointError(
            f"model {model!r}: access is restricted; accept its terms on its page, then run `hf auth login`"
        ) from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise NotFoundError(
            f"model {model!r} not found: no such folder, and the Hub has no such model, "
            "or it is private (then run `hf auth login`)"
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise NotFoundError(f"model {model!r} not found: the Hub has the model, but no revision {revision!r}") from None
    if isinstance(error, errors.HFValidationError):
        raise NotFoundError(f"model {model!r} not found: no such folder, and not a valid id of the Hub") from None
    if isinstance(error, errors.HfHubHTTPError):
        raise CheckpointError(
            f"model {model!r}: the Hub answered with status {error.response.status_code}; try again later"
        ) from None
    if isinstance(error, OSError):
        raise CheckpointError(
            f"model {model!r}: could not be fetched: {os_reason(error)}; check the connection, and run the command again"
        ) from None
    raise CheckpointError(
        f"model {model!r}: could not be fetched: {type(error).__name__}; check the connection, and run the command again"
    ) from None
