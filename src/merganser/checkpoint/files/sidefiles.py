"""The side files of a checkpoint: neither weights nor config, but needed to use an output."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path, PureWindowsPath
from typing import Any

from ...errors import CheckpointError
from ...jsonfile import open_regular, os_reason, read_json
from .links import inside
from .weights import is_weight_file

__all__ = [
    "TEMPLATE_FOLDERS",
    "copy_file",
    "is_module_file",
    "is_side_file",
    "is_tokenizer_file",
    "list_side_files",
    "module_folders",
]

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".merges", ".spm", ".tokens")
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)", re.IGNORECASE)

# Files that describe this one checkpoint, its training or its packaging, and would be wrong with other weights.
_OWN = re.compile(
    r"(config\.json|params\.json|.*\.index(\..+)?\.json|README.*|adapter_.*|merge\.(vocabulary\.)?json|mergekit_.*|"
    r"(trainer|scheduler|optimizer|training).*|(all|train|eval|test|predict)_results.*|.*quanti[sz]e?_config\.json|"
    r"quantization_config\.json|zero_to_fp32\.py|.*requirements\.txt|model_index\.json|quant_log.*|.*\.log)",
    re.IGNORECASE,
)


TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
"""Folders for chat templates beyond the first."""

_MODULES = "modules.json"
_ROUTER = "router_config.json"


def is_side_file(name: str) -> bool:
    """Return whether the file at this path, relative to the checkpoint's folder, is one to copy to an output."""
    folder, _, last = name.rpartition("/")
    return (not folder or folder in TEMPLATE_FOLDERS) and _is_wanted(last)


def _is_wanted(last: str) -> bool:
    if last.startswith(".") or is_weight_file(last) or _OWN.fullmatch(last):
        return False
    return last.endswith(_SUFFIXES) or _LICENCE.match(last) is not None


def is_module_file(name: str, folders: Collection[str]) -> bool:
    """Return whether a file is copied because it is in the folder of a module; see `module_folders`."""
    folder, _, last = name.rpartition("/")
    return folder in folders and (last == "config.json" or is_weight_file(last) or _is_wanted(last))


def module_folders(folder: Path) -> list[str]:
    """Return the folders of modules that sentence-transformers applies after the language model, such as `1_Pooling`.

    `modules.json` and `router_config.json` name them; sentence-transformers needs them to open the checkpoint. A named
    folder need not exist: modules without settings have none.

    Raises:
        CheckpointError: One of the two files is damaged, or names a folder outside the checkpoint.
    """
    found: dict[str, None] = {}
    for name, read in ((_MODULES, _modules), (_ROUTER, _routes)):
        if (folder / name).is_symlink() or (folder / name).exists():
            file = inside(folder, name, str(folder))
            for path in read(read_json(file)):
                _check_folder(file, path)
                found[path.strip("/")] = None
    return [path for path in found if path not in ("", ".")]


def _modules(content: Any) -> Iterator[str]:
    for entry in content if isinstance(content, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            yield entry["path"]


def _routes(content: Any) -> Iterator[str]:
    types = content.get("types") if isinstance(content, dict) else None
    yield from types if isinstance(types, dict) else ()


def _check_folder(file: Path, path: str) -> None:
    # Parsed by Windows rules, the strictest (both slashes, drives, shares), so that it means the same on every system.
    read = PureWindowsPath(path)
    if read.anchor or ".." in read.parts or "\0" in path or "\\" in path:
        raise CheckpointError(
            f"{file}: folder {path!r} of a module is not inside the checkpoint's folder, where it must be"
        )


def list_side_files(folder: Path) -> list[Path]:
    """Return the side files of a checkpoint's folder, sorted by their relative paths.

    Raises:
        CheckpointError: One is a pipe, a device, a link that is broken or leaves the folder, or cannot be read.
    """
    modules = module_folders(folder)
    places = [folder, *(folder / name for name in (*TEMPLATE_FOLDERS, *modules))]
    names = {path.relative_to(folder).as_posix() for place in places if place.is_dir() for path in place.iterdir()}
    wanted = sorted(name for name in names if is_side_file(name) or is_module_file(name, modules))
    files = [inside(folder, name, str(folder)) for name in wanted if not (folder / name).is_dir()]
    for file in files:
        # Refuse unreadable files now, before hours of merging, and not when they are copied.
        _open(file).close()
    return files


def _open(file: Path) -> BufferedReader:
    try:
        return open_regular(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None


def is_tokenizer_file(name: str) -> bool:
    """Return whether a side file belongs to the tokenizer of the language model."""
    folder, _, last = name.rpartition("/")
    exact = {"vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"}
    endings = (".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".spm")
    known = last in exact or last.startswith(("tokenizer", "chat_template")) or last.endswith(endings)
    return known and (not folder or folder in TEMPLATE_FOLDERS)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's contents, and create the target's folder.

    Raises:
        CheckpointError: The source cannot be read, or is not a regular file.
        OSError: The target cannot be written.
    """
    with _open(source) as file:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            shutil.copyfileobj(file, copy)
