"""The folder of a logit cache: its description, and reading it back.

A folder holds `logits.json` and shards `logits-00001-of-00002.safetensors`. With n positions in m sequences, a shard has:

token_ids               int32   [n]     the tokens of the text
byte_ends               int64   [n]     bytes of the sequence up to the token's end; special tokens take none
counted                 bool    [n]     whether the token counts (a completion, say)
token_log_probabilities float32 [n]     of the token, given those before it; 0 for the first of a sequence
ids                     int32   [n, k]  the likeliest tokens to follow, the likeliest first
log_probabilities       float32 [n, k]  theirs
rest                    float32 [n]     logarithm of the probability of all other tokens together
log_sum_exp             float32 [n]     of all logits
word_log_probabilities  float32 [n]     logarithm of the probability that a word begins, as `Vocabulary.begin_words` says
sequence_ends           int64   [m]     positions up to the end of each sequence
records                 int64   [m]     a hash of the record that the sequence is from: `distillation.texts.record_number`
text                    uint8   [bytes] the bytes of all sequences, one behind the other

`vocabulary.safetensors` holds the bytes of the source's tokens, as `Vocabulary.to_arrays` returns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Reader
from ..checkpoint.formats.safetensors import read_header
from ..errors import DataError, MergeError
from ..jsonfile import Entry, read_object
from .vocabulary import Vocabulary

__all__ = [
    "CACHE_FORMAT",
    "CACHE_KIND",
    "CACHE_NAME",
    "DTYPES",
    "NUMBERS",
    "VOCABULARY_NAME",
    "LogitCache",
    "open_cache",
]

CACHE_NAME = "logits.json"
CACHE_KIND = "merganser logit cache"
CACHE_FORMAT = 3
VOCABULARY_NAME = "vocabulary.safetensors"

DTYPES = {
    "token_ids": "int32",
    "byte_ends": "int64",
    "counted": "bool",
    "token_log_probabilities": "float32",
    "ids": "int32",
    "log_probabilities": "float32",
    "rest": "float32",
    "log_sum_exp": "float32",
    "word_log_probabilities": "float32",
    "sequence_ends": "int64",
    "records": "int64",
    "text": "uint8",
}
"""Dtypes of the tensors of a shard, by name."""

NUMBERS = ("sequences", "tokens", "predicted", "bytes", "predicted_bytes", "nats", "rest")
"""Numbers of each shard in logits.json: `predicted` tokens have others before them, `predicted_bytes` are theirs, `nats` is
the sum of their negative log-probabilities; `rest` is the sum over all positions of the probability beyond the top k."""


_ABOVE = 1e-4


@dataclass(frozen=True)
class LogitCache:
    """What a model predicts on text.

    Args:
        path: The folder.
        about: The contents of logits.json.
        files: Names of its shards.
    """

    path: Path
    about: Mapping[str, Any]
    files: tuple[str, ...]

    @property
    def k(self) -> int:
        """Number of tokens per position."""
        found: int = self.about["k"]
        return found

    @property
    def nbytes(self) -> int:
        """Size of the shards."""
        return sum((self.path / name).stat().st_size for name in self.files)

    def total(self, key: str) -> float:
        """Return the sum of a number over all shards: `tokens`, `sequences`, and the other keys of `NUMBERS`."""
        return float(sum(shard[key] for shard in self.about["shards"]))

    def shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a shard, by name.

        Raises:
            DataError: The shard is missing, damaged or incomplete.
        """
        file = self.path / self.files[number]
        found = _tensors(file)
        for name, dtype in DTYPES.items():
            if name not in found:
                raise DataError(f"{file}: tensor {name!r} is missing; write the cache again")
            if str(found[name].dtype) != f"torch.{dtype}":
                raise DataError(
                    f"{file}: {name!r} is {found[name].dtype}, expected torch.{dtype}; write the cache again"
                )
        n, m, k = len(found["token_ids"]), len(found["sequence_ends"]), self.k
        for name, tensor in found.items():
            if name in ("text", "sequence_ends"):
                continue
            wanted = (n, k) if name in ("ids", "log_probabilities") else (m,) if name == "records" else (n,)
            if tensor.shape != wanted:
                raise DataError(
                    f"{file}: {name!r} has shape {list(tensor.shape)}, expected {list(wanted)}; write the cache again"
                )
        _check_values(file, found, self.size)
        return found

    @property
    def size(self) -> int:
        """Number of logits of the source."""
        found: int = self.about["vocabulary"]
        return found

    def vocabulary(self) -> Vocabulary:
        """Return the tokens of the source.

        Raises:
            DataError: They are missing or damaged.
        """
        file = self.path / VOCABULARY_NAME
        entry = Entry(self.about, str(self.path / CACHE_NAME))
        try:
            special, roles = ({name: own.whole() for name, own in entry[key].items()} for key in ("special", "roles"))
            arrays = {name: tensor.numpy() for name, tensor in _tensors(file).items()}
            found = Vocabulary.from_arrays(arrays, special, roles)
            if any(number >= len(found) for number in (*special.values(), *roles.values())):
                raise ValueError("a special token is none of the tokens")
            return found
        except (KeyError, ValueError) as error:
            raise DataError(f"{file}: is damaged ({error}); write the cache again") from None


def _check_values(file: Path, found: Mapping[str, Tensor], size: int) -> None:
    """Refuse sequences that do not fit their tokens, tokens that the source does not have, and what is not a probability.

    Raises:
        DataError: The shard holds such a thing.
    """
    ends, bytes_ = found["sequence_ends"], found["byte_ends"]
    starts = torch.cat([ends.new_zeros(1), ends])
    fits = bool((starts.diff() > 0).all()) and int(starts[-1]) == len(bytes_)
    if fits:
        widths = bytes_.diff(prepend=bytes_.new_zeros(1))
        widths[starts[:-1]] = bytes_[starts[:-1]]
        fits = bool((widths >= 0).all()) and int(bytes_[ends - 1].sum()) == len(found["text"])
    if not fits:
        raise DataError(f"{file}: its sequences do not fit its tokens; write the cache again")
    for name in ("token_ids", "ids"):
        if bool(((found[name] < 0) | (found[name] >= size)).any()):
            raise DataError(
                f"{file}: {name!r} has tokens that are none of the source's {size:,}; write the cache again"
            )
    for name in ("token_log_probabilities", "log_probabilities", "rest", "word_log_probabilities"):
        # written so that NaN is refused, too; sums of float32 may be a little above 0
        if not bool((found[name] <= _ABOVE).all()):
            raise DataError(f"{file}: {name!r} is not the logarithm of a probability everywhere; write the cache again")


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        infos, _ = read_header(file)
        with Reader() as reader:
            return {info.name: reader.tensor(info) for info in infos}
    except MergeError as error:
        raise DataError(str(error)) from None


def open_cache(folder: str | Path) -> LogitCache:
    """Open a logit cache by reading its description.

    Raises:
        DataError: It is missing, damaged, or has another version.
    """
    path = Path(folder).expanduser()
    file = path / CACHE_NAME
    if not file.is_file():
        kind = "is not a logit cache" if path.exists() else "there is no such folder"
        raise DataError(f"{folder}: {kind} (no {CACHE_NAME}); merganser fuse cache writes one")
    try:
        about = read_object(file)
        entry = Entry(about, str(file))
        if entry["kind"].text() != CACHE_KIND:
            raise DataError(f"{file}: is not a description of a logit cache; merganser fuse cache writes one")
        if entry["format"].whole() != CACHE_FORMAT:
            raise DataError(
                f"{file}: has format {about['format']}, this version reads {CACHE_FORMAT}; write the cache again"
            )
        for key in ("k", "vocabulary"):
            entry[key].whole()
        entry["parts"].each(lambda own: own["length"].whole())
        shards = entry["shards"].each(lambda own: own)
        for own in shards:
            for key in NUMBERS:
                own[key].number()
        files = tuple(own["file"].text() for own in shards)
    except DataError:
        raise
    except MergeError as error:
        raise DataError(str(error)) from None
    for name in files:
        if Path(name).name != name:
            raise DataError(f"{file}: shards: {name!r} leaves the folder")
        if not (path / name).is_file():
            raise DataError(f"{path / name}: there is no such file; write the cache again")
    return LogitCache(path, about, files)
