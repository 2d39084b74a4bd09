"""Run two models on the same tokens, a block of each at a time, and write correlations of their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...anatomy.symmetry import Units
from ...errors import CheckpointError, DataError
from ...process import release_freed_memory
from ...statistics.correlations import (
    CORRELATIONS_FORMAT,
    CORRELATIONS_KIND,
    CORRELATIONS_NAME,
    Correlations,
    open_correlations,
)
from ...version import __version__
from ..forward.forward import check_streamable
from ..forward.skeleton import Block
from ..forward.stream import Stream, StreamState
from ..output.target import Target
from ..output.writer import Sum, file_name, write_json, write_sums
from ..single.preparation import Prepared, fingerprint
from ..single.run import Progress
from ..sums.taps import Taps
from .sums import Correlation, Feature, features, units_of

__all__ = ["about_pair", "correlate", "same_tokens", "same_units"]

_SPOOLS = ("hidden-of-reference", "hidden-of-model")


def correlate(
    reference: Prepared, model: Prepared, kinds: Sequence[str], out: Path, progress: Progress | None = None
) -> Correlations:
    """Write the correlations of the units of two models, or continue an interrupted run.

    Args:
        reference: The model that keeps its order.
        model: The other one, prepared with the same data.
        kinds: Which units, of "mlp", "heads" and "residual".
        out: The folder to write; it must not exist.
        progress: Called with the number of finished blocks and of all blocks.

    Raises:
        DataError: The tokenizers give different tokens.
        CheckpointError: The models have different units, or one is damaged.
        UnsupportedError: It is not known which permutations leave a model's output unchanged, or it cannot be run one
            block at a time.
        NonFiniteError: A model produces NaN or infinity.
        OutputError: `out` exists or cannot be written.
    """
    same_tokens(reference, model)
    units = same_units(reference, model, kinds)
    pair = (reference, model)
    for own in pair:
        own.skeleton.fill_outside()
        check_streamable(own.skeleton, own.probe())
    about = about_pair(reference, model, kinds)
    with Target(out, fingerprint(about, reference.batch_tokens), about=CORRELATIONS_NAME) as target:
        if not target.finished:
            files = _stream(pair, units, target, progress)
            write_json(target.folder / CORRELATIONS_NAME, {**about, "files": files})
        target.publish(_SPOOLS)
    return open_correlations(out)


def _stream(
    pair: tuple[Prepared, Prepared],
    units: tuple[Sequence[Units], Sequence[Units]],
    target: Target,
    progress: Progress | None,
) -> list[str]:
    """Run all blocks of both models, or continue; write the correlations, and return the names of their files."""
    reference = pair[0]
    count = len(reference.skeleton.blocks)
    files = [file_name(number, count, "correlations") for number in range(1, count + 1)]
    target.claim([*(f"{spool}/" for spool in _SPOOLS), *files])
    states = target.state.get("streams", [None, None])
    streams = []
    for own, name, state in zip(pair, _SPOOLS, states, strict=True):
        spool = target.folder / name
        spool.mkdir(exist_ok=True)
        known = None if state is None else StreamState.from_json(state)
        # both read the same samples, so that a row is the same token in both
        batches = replace(own, samples=reference.samples, batch_tokens=reference.batch_tokens).batches()
        streams.append(Stream(own.skeleton, batches, spool, known))
    for index in range(streams[0].state.done, count):
        if progress is not None:
            progress(index, count)
        write_sums(target.folder / files[index], _compare(streams[0], streams[1], index, units))
        target.note({"streams": [stream.state.to_json() for stream in streams]})
        release_freed_memory()
    return files


def same_tokens(reference: Prepared, model: Prepared) -> None:
    """Check that both models read the same tokens.

    Raises:
        DataError: They do not.
    """
    if [own.stacks for own in reference.samples] != [own.stacks for own in model.samples]:
        raise DataError(
            f"the tokenizers of {reference.source.reference} and {model.source.reference} give different tokens for the "
            "same text, so what the models compute cannot be compared token by token; align by weights"
        )


def same_units(reference: Prepared, model: Prepared, kinds: Sequence[str]) -> tuple[list[Units], list[Units]]:
    """Return the units of both models.

    Raises:
        CheckpointError: They differ.
        UnsupportedError: They are not known.
    """
    ours, theirs = (units_of(own.skeleton, kinds) for own in (reference, model))
    sizes = [{(each.name, each.size, each.inner and each.inner.size) for each in units} for units in (ours, theirs)]
    if sizes[0] != sizes[1]:
        names = sorted(str(name) for name, *_ in sizes[0] ^ sizes[1])
        raise CheckpointError(
            f"{names[0]}: {reference.source.reference} and {model.source.reference} have different units here, or other "
            "names of tensors, so they cannot be aligned"
        )
    return ours, theirs


def about_pair(reference: Prepared, model: Prepared, kinds: Sequence[str], *, hashing: bool = True) -> dict[str, Any]:
    """Return what correlations.json says of the models, the data and the settings.

    Args:
        reference: The model that keeps its order.
        model: The other one.
        kinds: Which units are compared.
        hashing: Whether to hash the models' files, which reads them; the hashes are empty otherwise.
    """
    ours, theirs = (own.about(hashing=hashing) for own in (reference, model))
    return {
        "kind": CORRELATIONS_KIND,
        "format": CORRELATIONS_FORMAT,
        "merganser": __version__,
        "reference": ours["model"],
        "model": theirs["model"],
        "tokenizer": ours["tokenizer"],
        "parts": ours["parts"],
        "units": list(kinds),
    }


def _compare(
    reference: Stream, model: Stream, index: int, units: tuple[Sequence[Units], Sequence[Units]]
) -> Mapping[str, Sum]:
    """Run a block of both models on all batches, and return the correlations of its units."""
    blocks = [stream.skeleton.blocks[index] for stream in (reference, model)]
    places = [
        features(stream.skeleton, block, own)
        for stream, block, own in zip((reference, model), blocks, units, strict=True)
    ]
    found: dict[tuple[str, int], Correlation] = {}
    with reference.skeleton.filled(blocks[0]), model.skeleton.filled(blocks[1]):
        for number in range(len(reference.batches)):
            ours = _seen(reference, blocks[0], number, places[0])
            theirs = _seen(model, blocks[1], number, places[1])
            for key, (feature, rows) in ours.items():
                if key not in found:
                    found[key] = Correlation(feature)
                found[key].add(rows, theirs[key][1])
    reference.finish()
    model.finish()
    together: dict[str, list[Correlation]] = {}
    for (name, _), own in found.items():
        together.setdefault(name, []).append(own)
    return {name: Sum((own[0].size, own[0].size), "float32", partial(_total, own)) for name, own in together.items()}


def _total(each: Sequence[Correlation]) -> Tensor:
    return torch.stack([own.result() for own in each]).sum(0) if len(each) > 1 else each[0].result()


def _seen(
    stream: Stream, block: Block, number: int, places: Mapping[str, Feature]
) -> dict[tuple[str, int], tuple[Feature, Tensor]]:
    """Run a block on a batch; return the features that it shows, by the name of their units and in their order."""
    seen: dict[tuple[str, int], tuple[Feature, Tensor]] = {}

    def observe(parameter: str, _call: int, rows: Tensor) -> None:
        if parameter in places:
            name = places[parameter].units
            again = sum(each == name for each, _ in seen)
            seen[name, again] = places[parameter], rows

    taps = Taps(stream.skeleton, block, [], observe)
    with taps.watching():
        taps.begin(stream.batches[number])
        stream.store(number, stream.output(number))
    return seen
