"""Everything that a calibration needs before the first block runs: the model without weights, and the tokens of the data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from ...adapters import open_reference, published_name
from ...checkpoint import Checkpoint
from ...errors import DataError, UnsupportedError, did_you_mean
from ...inference.language_model import Tokenizer, open_tokenizer
from ...inference.stored import Source, open_stored
from ...statistics import COUNT, LOSS, STATISTICS_FORMAT, STATISTICS_KIND, Choice, Dataset
from ...statistics.choice import BATCH_TOKENS, LABELS
from ...statistics.weights import weights_sample
from ...version import __version__
from ..data.batches import Batch, Sample, Tokens, make_batches, padding_token
from ..data.data import DataFile, read_data
from ..data.dataset import read_dataset
from ..data.samples import choose_samples
from ..forward.skeleton import Skeleton
from ..reverse import GRADIENTS
from ..sums.reducers import REDUCERS

__all__ = ["STATISTICS", "Data", "Prepared", "Reading", "check_given", "fingerprint", "prepare", "read"]

STATISTICS = (COUNT, *REDUCERS, *GRADIENTS, LOSS)
"""Names of all statistics."""

Data = str | Path | Sequence[str | Path] | Dataset
"""A file, files, or a data set."""

# a small batch is enough to check that a model can be streamed
_PROBE_SAMPLES, _PROBE_TOKENS = 3, 7


@dataclass(frozen=True)
class Reading:
    """How models read text within a merge.

    Args:
        checkpoint: The merged model; only its shapes are used.
        tokenizer: Where its tokenizer is, if the merge gives its models one vocabulary; None if each has its own.
    """

    checkpoint: Checkpoint
    tokenizer: Source | None


@dataclass(frozen=True)
class Prepared:
    """A model and the data that it will be calibrated on.

    Args:
        source: The model, as it is stored.
        checkpoint: The model, opened.
        skeleton: The model without weights; with a `Reading`, the merged model.
        tokenizer: The tokenizer that reads the data.
        files: The data.
        samples: The sequences that were drawn.
        choice: How they were drawn; all values are set.
        statistics: What is summed; `count` comes first.
        batch_tokens: Largest number of tokens of a batch, with padding; 1 with a loss, so that each sequence is its own.
        labels: The tokens whose likelihood is the loss, as in `calibrate`; None without a loss.
    """

    source: Source
    checkpoint: Checkpoint
    skeleton: Skeleton
    tokenizer: Tokenizer
    files: Sequence[DataFile]
    samples: Sequence[Sample]
    choice: Choice
    statistics: tuple[str, ...]
    batch_tokens: int
    labels: str | None = None

    @property
    def pad_id(self) -> int:
        """The padding token; no result depends on it."""
        return padding_token(self.skeleton.model.config)

    def batches(self, most: int | None = None) -> list[Batch]:
        """Return the samples in the batches in which the model reads them.

        Args:
            most: Largest number of sequences in a batch; None for no limit but that of tokens.
        """
        equal = not self.skeleton.ignores_padding
        return make_batches(self.samples, self.batch_tokens, self.pad_id, most, equal=equal)

    def probe(self) -> Batch:
        """Return a batch of a few tokens of the data, without padding.

        Its shape is odd on purpose: an input with a row per token can then be told from tables that blocks read, which
        have rows for distances in both directions.
        """
        length = min(_PROBE_TOKENS, self.choice.length or _PROBE_TOKENS)
        chosen = [self.samples[i % len(self.samples)] for i in range(_PROBE_SAMPLES)]
        short = [
            Sample(tuple(_filled_up(own, length - 2 * stack) for stack, own in enumerate(each.stacks)), each.where)
            for each in chosen
        ]
        return make_batches(short, len(short) * length, self.pad_id)[0]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads."""
        return sum(len(tokens.ids) for sample in self.samples for tokens in sample.stacks)

    @property
    def counted(self) -> int:
        """Number of tokens that statistics include."""
        return sum(sum(tokens.counted) for sample in self.samples for tokens in sample.stacks)

    def about(self, *, hashing: bool = True) -> dict[str, Any]:
        """Return what statistics.json says of model, tokenizer, data and settings.

        Args:
            hashing: Whether to hash the model's files, which reads them; the hash is empty otherwise.
        """
        return {
            "kind": STATISTICS_KIND,
            "format": STATISTICS_FORMAT,
            "merganser": __version__,
            "model": {
                "reference": published_name(self.source.reference),
                "hash": self.source.hash if hashing else "",
                "sample": weights_sample(self.checkpoint),
                "architecture": type(self.skeleton.model).__name__,
                "dtype": str(self.skeleton.dtype).removeprefix("torch."),
            },
            "tokenizer": self.tokenizer.hash,
            "statistics": list(self.statistics),
            "parts": [self.part()],
            **({} if self.labels is None else {"labels": self.labels}),
        }

    def part(self) -> dict[str, Any]:
        """Return what statistics.json says of one pass over the data."""
        return {
            "data": [{"file": Path(file.path).name, "hash": file.hash, "bytes": file.nbytes} for file in self.files],
            "length": self.choice.length,
            "seed": self.choice.seed,
            "tokens_counted": self.choice.tokens,
            "sequences": len(self.samples),
            "tokens": self.tokens,
            "counted": self.counted,
        }


def read(data: Data) -> list[DataFile]:
    """Read files, or a data set.

    Raises:
        DataError: They are missing, empty or malformed.
        UnsupportedError: A library that reads them is not installed.
    """
    return [read_dataset(data)] if isinstance(data, Dataset) else read_data(data)


@contextmanager
def prepare(
    model: str | Path,
    data: Data,
    *,
    statistics: str | Sequence[str] = ("gram",),
    choice: Choice | None = None,
    labels: str = "data",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    reading: Reading | None = None,
) -> Iterator[Prepared]:
    """Open a model and its tokenizer, read the data and draw sequences; no weights are read.

    Args:
        model: A checkpoint: a folder, a file of weights, or a Hub id; with `+ADAPTER` for one with an adapter.
        data: Files, or a data set.
        statistics: Names of the statistics to sum.
        choice: Which part of the data; None for the defaults.
        labels: The tokens whose likelihood is the loss, as in `calibrate`.
        batch_tokens: Largest number of tokens of a batch, with padding.
        cache_dir: Folder for models from the Hub.
        dtype: Dtype in which the model runs; None for that of the checkpoint, or float32 for a loss.
        reading: How it reads text within a merge; None for its own way.

    Yields:
        The prepared calibration, until the context ends.

    Raises:
        DataError: The data, or the options for them, are not valid.
        CheckpointError: The model is missing, damaged, or has no tokenizer.
        UnsupportedError: transformers does not know the model, or it cannot be run one block at a time.
    """
    wanted = _statistics(statistics)
    choice = choice or Choice()
    choice.check()
    if batch_tokens < 1:
        raise DataError(f"batch_tokens: must be at least 1, found {batch_tokens}")
    if labels not in LABELS:
        raise DataError(f"labels: must be {' or '.join(LABELS)}, found {labels!r}")
    with_loss = LOSS in wanted
    files = read(data)
    if str(model).endswith((".yaml", ".yml")) and not Path(model).is_dir():
        raise _no_checkpoint(model, "recipe")
    source = open_stored(model, cache_dir=cache_dir)
    if source.kind not in ("checkpoint", "adapter"):
        raise _no_checkpoint(model, source.kind)
    # gradients are computed in float32, whatever the dtype of the checkpoint
    dtype = torch.float32 if with_loss else dtype
    with ExitStack() as stack:
        checkpoint = open_reference(str(model), cache_dir=cache_dir)
        skeleton = stack.enter_context(Skeleton(checkpoint if reading is None else reading.checkpoint, dtype))
        config = skeleton.model.config
        tokenizer = open_tokenizer((reading and reading.tokenizer) or source)
        choice = choice.for_model(skeleton.positions)
        samples = choose_samples(files, tokenizer, config, choice)
        size = 1 if with_loss else batch_tokens
        yield Prepared(
            source=source,
            checkpoint=checkpoint,
            skeleton=skeleton,
            tokenizer=tokenizer,
            files=files,
            samples=samples,
            choice=choice,
            statistics=wanted,
            batch_tokens=size,
            labels=labels if with_loss else None,
        )


def _filled_up(tokens: Tokens, length: int) -> Tokens:
    """Return the first tokens of a sequence, again from its start if it is shorter."""
    length = max(length, 1)
    ids = (tokens.ids * -(-length // len(tokens.ids)))[:length]
    return Tokens(ids, (True,) * length)


def _no_checkpoint(model: str | Path, kind: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model}: only checkpoints can be calibrated on; write the {kind} out as a checkpoint first"
    )


def check_given(statistics: str | Sequence[str]) -> None:
    """Check that a user asks for some statistics.

    Raises:
        DataError: There are none.
    """
    if not statistics:
        raise DataError(f"statistics: none given; give some of {', '.join(STATISTICS)}")


def _statistics(names: str | Sequence[str]) -> tuple[str, ...]:
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in STATISTICS:
            raise DataError(
                f"statistics: unknown statistic {name!r}.{did_you_mean(name, STATISTICS)} "
                f"Known are {', '.join(STATISTICS)}"
            )
    included = {COUNT, *names, *([LOSS] if any(name in GRADIENTS for name in names) else [])}
    return tuple(name for name in STATISTICS if name in included)


def fingerprint(about: Mapping[str, Any], batch_tokens: int) -> str:
    """Return a hash of everything that affects the result; only a run with the same hash is continued."""
    return xxhash.xxh3_128_hexdigest(json.dumps([about, batch_tokens], sort_keys=True).encode())
