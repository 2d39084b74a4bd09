"""Divide data into clusters of similar records, to train a model on each (Disperse-then-Merge)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import published_name
from ..calibration.data.batches import Sample, make_batches, padding_token
from ..calibration.data.data import Record
from ..calibration.data.samples import first_samples
from ..calibration.output.target import Target, check_absent
from ..calibration.output.writer import write_json
from ..calibration.single.preparation import Data, fingerprint, read
from ..engine.output.failure import failures_of
from ..errors import DataError, NonFiniteError
from ..files import write_whole
from ..inference.language_model import LanguageModel, open_model
from ..inference.stored import open_stored
from ..jsonfile import read_object
from ..statistics import Choice
from ..version import __version__
from .clusters import k_means
from .texts import contents

__all__ = ["CLUSTERS_NAME", "Dispersed", "disperse"]

CLUSTERS_NAME = "clusters.json"
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Dispersed:
    """Data in clusters.

    Args:
        path: The folder.
        sizes: Number of records of each file of it, by name.
    """

    path: Path
    sizes: dict[str, int]


def disperse(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    clusters: int = 4,
    length: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dispersed:
    """Embed every record by a model, and write the records of each cluster to a file of their own.

    A record's embedding is the mean of the model's last hidden states over its beginning. Clusters are found by k-means on
    the directions from the mean of all.

    Args:
        model: The model that embeds: a checkpoint, a folder or a Hub id.
        data: Files of records, or a data set.
        out: The folder to write; it must not exist.
        clusters: Number of clusters.
        length: Tokens of a record that are read; None for 256, or what the model can see.
        seed: Seed of the first centres.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of batches that are done, and of all.

    Raises:
        DataError: The data are not valid, or have fewer records than clusters.
        CheckpointError: The model cannot be read.
        NonFiniteError: The model computes NaN or infinity.
        OutputError: `out` exists or cannot be written.

    Source:
        Fu et al., Disperse-Then-Merge, Findings of ACL 2024, which clusters instructions by k-means, too.
    """
    out = Path(out)
    check_absent(out)
    if clusters < 1:
        raise DataError(f"clusters: must be at least 1, found {clusters}")
    files = read(data)
    records = [record for file in files for record in file.records]
    if len(records) < clusters:
        raise DataError(
            f"clusters: {clusters} are asked for, and the data have {len(records)} records; give more, one per line of a "
            ".jsonl file"
        )
    source = open_stored(model, cache_dir=cache_dir)
    opened = open_model(source)
    choice = Choice(None, length, seed).for_model(opened.positions)
    samples = first_samples(files, opened.tokenizer, opened.config, choice)
    about: dict[str, Any] = {
        "kind": "merganser clusters",
        "format": 1,
        "merganser": __version__,
        "model": {"reference": published_name(str(model)), "hash": source.hash},
        "data": [{"file": Path(file.path).name, "hash": file.hash} for file in files],
        "length": choice.length,
        "seed": seed,
    }
    with Target(out, fingerprint({**about, "clusters": clusters}, 0), CLUSTERS_NAME) as target:
        if not target.finished:
            found = k_means(_embeddings(opened, samples, progress), clusters, seed).tolist()
            by_place = {sample.where: number for sample, number in zip(samples, found, strict=True)}
            groups: list[list[Record]] = [[] for _ in range(clusters)]
            for record in records:
                if record.where in by_place:
                    groups[by_place[record.where]].append(record)
            write_json(target.folder / CLUSTERS_NAME, {**about, "clusters": _write(groups, target)})
        sizes: dict[str, int] = read_object(target.folder / CLUSTERS_NAME)["clusters"]
        target.publish()
    return Dispersed(out, sizes)


def _write(groups: Sequence[Sequence[Record]], target: Target) -> dict[str, int]:
    """Write the records of each cluster to a file of their own, and return how many each file has."""
    names = [f"cluster-{number + 1}.jsonl" for number in range(len(groups))]
    target.claim([*names, *(f".{name}.new" for name in names)])
    with failures_of(target.out):
        for name, records in zip(names, groups, strict=True):
            text = "".join(f"{json.dumps(contents(own), ensure_ascii=False)}\n" for own in records)
            write_whole(target.folder / name, text, temporary=target.folder / f".{name}.new")
    return {name: len(records) for name, records in zip(names, groups, strict=True)}


def _embeddings(opened: LanguageModel, samples: list[Sample], progress: Callable[[int, int], None] | None) -> Tensor:
    """Return the mean of the last hidden states of each sample, float64, shape [samples, width]."""
    model = opened.load(opened.source.read(), torch.float32, torch.device("cpu"))
    batches = make_batches(samples, _BATCH_TOKENS, padding_token(opened.config))
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        padded = batch.stacks[0]
        with torch.inference_mode():
            states = model(**batch.inputs(), use_cache=False, output_hidden_states=True).hidden_states[-1].double()
        means = (states * padded.valid[..., None]).sum(1) / padded.valid.sum(1, keepdim=True)
        for where, mean in zip(batch.where, means, strict=True):
            if not bool(mean.isfinite().all()):
                raise NonFiniteError(f"{where}: the model's hidden states are NaN or infinite for this text")
            found[where] = mean
        if progress is not None:
            progress(number + 1, len(batches))
    return torch.stack([found[sample.where] for sample in samples])
