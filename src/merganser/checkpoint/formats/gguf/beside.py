"""The config and the tokenizer of a GGUF file that lies alone: made by transformers from what the file says, and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from ....errors import CheckpointError, UnsupportedError

__all__ = ["folder_beside"]

_LONGEST = 1 << 30
"""Tokens of the longest text, if the file does not say it."""


def folder_beside(file: Path) -> Path:
    """Return a folder with config.json and the files of the tokenizer, made once for each state of the file.

    The folder is in the cache of the user; a merge that is interrupted and continued finds the same files.

    Raises:
        UnsupportedError: transformers is not installed.
        CheckpointError: It cannot make a config from this file.
    """
    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:24]
    folder = _cache() / key
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
    try:
        _make(file, working)
        try:
            working.rename(folder)
        except OSError:  # another process was first
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser" / "gguf"


def _make(file: Path, folder: Path) -> None:
    try:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        raise UnsupportedError(
            f"{file}: no config.json lies beside it; put the model's config.json and tokenizer there, or let them be made "
            "from the file: pip install 'merganser[gguf,transformers]'"
        ) from None
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # transformers raises many types for files that it does not know
            try:
                config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
            except Exception as error:
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise CheckpointError(
                    f"{file}: transformers makes no config from it ({line[:200]}); put the model's config.json and "
                    "tokenizer beside it"
                ) from None
            try:
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
                if tokenizer.model_max_length > _LONGEST:  # what transformers writes for "not known"
                    tokenizer.init_kwargs["model_max_length"] = tokenizer.model_max_length = _LONGEST
                tokenizer.save_pretrained(folder)
            except Exception:
                # the weights can be merged without; the output says that it has no tokenizer
                for path in folder.iterdir():
                    path.unlink()
    finally:
        logger.setLevel(level)
    config.pop("quantization_config", None)
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))
    if named is not None:
        config["architectures"] = [named]
    config = {key: value for key, value in config.items() if value is not None and not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
