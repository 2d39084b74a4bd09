"""The files of a checkpoint that are neither weights nor config, and that an output needs to be usable."""

from __future__ import annotations

import re
from pathlib import Path

from .weights import is_weight_file

__all__ = ["is_side_file", "side_file_names"]

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".merges", ".spm", ".tokens")
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)", re.IGNORECASE)

# What describes this one checkpoint, its training or its packing, and would be wrong beside other weights.
_OWN = re.compile(
    r"(config\.json|params\.json|.*\.index(\..+)?\.json|README.*|adapter_.*|merge\.json|mergekit_.*|"
    r"(trainer|scheduler|optimizer|training).*|(all|train|eval|test|predict)_results.*|.*quanti[sz]e?_config\.json|"
    r"quantization_config\.json|zero_to_fp32\.py|.*requirements\.txt|model_index\.json|quant_log.*|.*\.log)",
    re.IGNORECASE,
)

# Chat templates beyond the first have a folder of their own.
_FOLDERS = ("additional_chat_templates",)


def is_side_file(name: str) -> bool:
    """Say whether a file, given by its path below the checkpoint's folder, is one to copy to an output."""
    folder, _, last = name.rpartition("/")
    if folder and folder not in _FOLDERS:
        return False
    if last.startswith(".") or is_weight_file(last) or _OWN.fullmatch(last):
        return False
    return last.endswith(_SUFFIXES) or _LICENCE.match(last) is not None


def side_file_names(folder: Path) -> list[str]:
    """Return the paths, below `folder` and sorted, of its side files."""
    places = [folder, *(folder / name for name in _FOLDERS)]
    files = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_file()]
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in files) if is_side_file(name))


def is_tokenizer_file(name: str) -> bool:
    """Say whether a side file belongs to the tokenizer."""
    last = name.rpartition("/")[2]
    exact = {"vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"}
    endings = (".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".spm")
    return last in exact or last.startswith(("tokenizer", "chat_template")) or last.endswith(endings)
