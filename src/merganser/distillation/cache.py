"""Write what a model predicts on text, with one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.data.batches import Batch, Padded
from ..calibration.data.samples import first_samples
from ..calibration.forward.forward import check_streamable
from ..calibration.forward.stream import Stream, StreamState
from ..calibration.output.target import Target, check_absent
from ..calibration.output.writer import Sum, file_name, write_json, write_sums
from ..calibration.single.preparation import Data, Prepared, fingerprint, prepare
from ..errors import DataError, NonFiniteError, UnsupportedError
from ..inference.language_model import positions_of
from ..process import release_freed_memory
from ..statistics import Choice
from .format import CACHE_FORMAT, CACHE_KIND, CACHE_NAME, DTYPES, VOCABULARY_NAME, LogitCache, open_cache
from .likelihoods import likelihoods
from .texts import record_number
from .token_bytes import TokenBytes

__all__ = ["BATCH_TOKENS", "TOP", "cache_beginnings", "cache_logits"]

Progress = Callable[[int, int], None]
"""Called with the number of finished steps and the number of all steps."""

TOP = 32
# logits are held for a whole batch: with 128 K tokens in the vocabulary this is a quarter of a gigabyte
BATCH_TOKENS = 512
_SHARD_TOKENS = 1 << 18
_SPOOL = "hidden"
# for models without a limit of positions
_LONGEST = 1 << 15

# a masked language model has logits, too, but they are not those of the next token
_NEXT_TOKEN = ("ForCausalLM", "LMHeadModel")


def cache_logits(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    k: int = TOP,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    tokens: str = "all",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> LogitCache:
    """Run a model on text in float32, one block in memory at a time, and write what it predicts at every position.

    An interrupted run continues when it is called again with the same arguments.

    Args:
        model: A checkpoint: a folder, a file of weights, or a Hub id.
        data: As for `merganser.calibrate`.
        out: The folder to write; it must not exist.
        k: Number of likeliest tokens that are stored per position.
        sequences: Number of sequences drawn from the data; None for 64, or fewer if the data has fewer.
        length: Largest number of tokens of a sequence; None for 256, or the model's context window if it is smaller.
        seed: Seed of the draw.
        tokens: Which tokens are marked to count: `all`, or those of `completions` alone.
        batch_tokens: Largest number of tokens of a batch, with padding.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished steps and of all steps.

    Returns:
        The cache.

    Raises:
        DataError: The data, or the options, are not valid.
        CheckpointError: The model is missing, damaged, or has no tokenizer.
        UnsupportedError: The model does not predict the next token, cannot be run one block at a time, or its tokens do
            not spell the text.
        NonFiniteError: The model produces NaN or infinity.
        OutputError: `out` exists or cannot be written.
    """
    check_absent(Path(out))
    with _prepared(model, data, k, Choice(sequences, length, seed, tokens), batch_tokens, cache_dir) as prepared:
        return _Run(prepared, k).write(Path(out), progress)


def cache_beginnings(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    k: int = TOP,
    length: int | None = None,
    tokens: str = "all",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> LogitCache:
    """As `cache_logits`, but on the beginning of every record, so that sources with other tokenizers read the same texts.

    Args:
        model: As for `cache_logits`, like the other arguments.
        data: The data.
        out: The folder to write.
        k: Number of likeliest tokens.
        length: Largest number of tokens of a sequence; None for as many as the model can see at once.
        tokens: Which tokens are marked to count.
        batch_tokens: Largest number of tokens of a batch.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished steps and of all steps.

    Raises:
        MergeError: As for `cache_logits`.
    """
    check_absent(Path(out))
    with _prepared(model, data, k, Choice(None, length, 0, tokens), batch_tokens, cache_dir) as prepared:
        config = prepared.skeleton.model.config
        choice = replace(prepared.choice, length=length or positions_of(config) or _LONGEST)
        samples = first_samples(prepared.files, prepared.tokenizer, config, choice)
        return _Run(replace(prepared, samples=samples, choice=choice), k).write(Path(out), progress)


def _prepared(
    model: str | Path, data: Data, k: int, choice: Choice, batch_tokens: int, cache_dir: Path | None
) -> AbstractContextManager[Prepared]:
    if k < 1:
        raise DataError(f"top: must be at least 1, found {k}")
    return prepare(
        model,
        data,
        statistics=(),
        choice=choice,
        batch_tokens=batch_tokens,
        cache_dir=cache_dir,
        # logits of bfloat16 have steps of a quarter where they are large
        dtype=torch.float32,
    )


class _Run:
    """A prepared cache.

    Args:
        prepared: Model and data.
        k: Number of tokens per position.
    """

    def __init__(self, prepared: Prepared, k: int) -> None:
        self._prepared, self._k = prepared, k
        self._vocabulary = _check_head(prepared, k)
        self._token_bytes = TokenBytes(prepared.tokenizer, prepared.source.reference)
        self._words = torch.from_numpy(self._token_bytes.vocabulary().begin_words(self._vocabulary))
        self._records = {own.where: record_number(own) for file in prepared.files for own in file.records}
        self._batches = prepared.batches()
        self._shards = _grouped(self._batches)

    def write(self, out: Path, progress: Progress | None) -> LogitCache:
        """Run the model, or continue, and write the folder."""
        skeleton = self._prepared.skeleton
        skeleton.fill_outside(head=True)
        check_streamable(skeleton, self._prepared.probe())
        about = self._about()
        with Target(out, fingerprint(about, self._prepared.batch_tokens), CACHE_NAME) as target:
            if not target.finished:
                shards = self._stream(target, progress)
                target.claim([VOCABULARY_NAME])
                self._write_vocabulary(target.folder / VOCABULARY_NAME)
                write_json(target.folder / CACHE_NAME, {**about, "shards": shards})
            target.publish([_SPOOL])
        return open_cache(out)

    def _about(self) -> dict[str, Any]:
        found = self._prepared.about()
        del found["statistics"]
        own = self._token_bytes.vocabulary()
        names = {"special": dict(own.special), "roles": dict(own.roles)}
        about = {"kind": CACHE_KIND, "format": CACHE_FORMAT, "k": self._k, "vocabulary": self._vocabulary}
        return {**found, **about, **names}

    def _write_vocabulary(self, file: Path) -> None:
        arrays = self._token_bytes.vocabulary().to_arrays()
        tensors = {name: torch.from_numpy(own.copy()) for name, own in arrays.items()}
        write_sums(file, _sums(tensors, {name: str(own.dtype) for name, own in arrays.items()}))

    def _stream(self, target: Target, progress: Progress | None) -> list[dict[str, Any]]:
        """Run all blocks, then the head shard by shard; return what logits.json says of the shards."""
        skeleton, count = self._prepared.skeleton, len(self._shards)
        blocks = len(skeleton.blocks)
        spool = target.folder / _SPOOL
        names = [file_name(number, count, "logits") for number in range(1, count + 1)]
        target.claim([f"{_SPOOL}/", *names])
        spool.mkdir(exist_ok=True)
        state = StreamState.from_json(target.state["stream"]) if target.state else None
        done: list[dict[str, Any]] = list(target.state.get("shards", []))
        stream = Stream(skeleton, self._batches, spool, state)

        def step(finished: int) -> None:
            target.note({"stream": stream.state.to_json(), "shards": done})
            if progress is not None:
                progress(finished, blocks + count)

        while stream.state.done < blocks:
            block = skeleton.blocks[stream.state.done]
            with skeleton.filled(block):
                stream.advance(lambda batch: None)
            step(stream.state.done)
        for name, numbers in list(zip(names, self._shards, strict=True))[len(done) :]:
            done.append({"file": name, **self._write_shard(target.folder / name, stream, numbers)})
            release_freed_memory()
            step(blocks + len(done))
        return done

    def _write_shard(self, file: Path, stream: Stream, numbers: Sequence[int]) -> dict[str, Any]:
        """Write what is predicted for some batches; return the numbers of it that logits.json holds."""
        parts: dict[str, list[Tensor]] = {name: [] for name in DTYPES}
        position = 0
        for number in numbers:
            batch = self._batches[number]
            logits, padded = stream.logits(number), batch.stacks[0]
            for row, where in enumerate(batch.where):
                for name, tensor in self._sequence(logits[row], padded, row, where).items():
                    parts[name].append(tensor)
                position += len(parts["token_ids"][-1])
                parts["sequence_ends"].append(torch.tensor([position]))
                parts["records"].append(torch.tensor([self._records[where]]))
        tensors = {name: torch.cat(own) for name, own in parts.items()}
        write_sums(file, _sums(tensors, DTYPES))
        count, ends = len(tensors["sequence_ends"]), tensors["sequence_ends"]
        firsts = tensors["byte_ends"][torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])]
        return {
            "sequences": count,
            "tokens": position,
            "predicted": position - count,
            "bytes": len(tensors["text"]),
            "predicted_bytes": len(tensors["text"]) - int(firsts.sum()),
            "nats": -float(tensors["token_log_probabilities"].double().sum()),
            "rest": float(tensors["rest"].double().exp().sum()),
        }

    def _sequence(self, logits: Tensor, padded: Padded, row: int, where: str) -> dict[str, Tensor]:
        """Return the tensors of one sequence that have a row per token, and its text."""
        valid = padded.valid[row]
        tokens, own = padded.ids[row][valid], logits[valid]
        if not bool(own.isfinite().all()):
            raise NonFiniteError(f"{where}: the model's logits are NaN or infinite for this text")
        # nothing follows the last token, so that the log-probability of any token will do there
        found, following = likelihoods(own, self._k, torch.cat([tokens[1:], tokens[:1]]), self._words)
        text, ends = self._token_bytes.text_and_ends(tokens.tolist())
        return {
            "token_ids": tokens.int(),
            "byte_ends": torch.tensor(ends),
            "counted": padded.counted[row][valid],
            "token_log_probabilities": torch.cat([torch.zeros(1), following[:-1]]),
            "ids": found.ids,
            "log_probabilities": found.log_probabilities,
            "rest": found.rest,
            "log_sum_exp": found.log_sum_exp,
            "word_log_probabilities": found.words,
            "text": torch.tensor(list(text), dtype=torch.uint8),
        }


def _sums(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Sum]:
    return {name: Sum(tuple(own.shape), dtypes[name], lambda own=own: own) for name, own in tensors.items()}  # type: ignore[misc]


def _check_head(prepared: Prepared, k: int) -> int:
    """Return the size of the vocabulary, after a check that the model predicts the next token and has k tokens."""
    model, reference = prepared.skeleton.model, prepared.source.reference
    name, head = type(model).__name__, model.get_output_embeddings()
    if not name.endswith(_NEXT_TOKEN) or head is None:
        raise UnsupportedError(
            f"{reference}: {name} does not predict the next token of a text; give a language model such as "
            "LlamaForCausalLM"
        )
    vocabulary: int = head.weight.shape[0]
    if k > vocabulary:
        raise DataError(f"top: {k} tokens are asked for, the vocabulary of {reference} has {vocabulary}; ask for fewer")
    return vocabulary


def _grouped(batches: Sequence[Batch]) -> list[list[int]]:
    """Divide batches into shards of about equal numbers of tokens."""
    found: list[list[int]] = []
    room = 0
    for number, batch in enumerate(batches):
        rows = batch.stacks[0].rows
        if rows > room:
            found.append([])
            room = _SHARD_TOKENS
        found[-1].append(number)
        room -= rows
    return found
