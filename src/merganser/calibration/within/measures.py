"""How the statistics of one block are measured within a merge, for each kind of inputs (`merganser.method.FromData`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.plan.plan import Plan
from ..data.batches import Batch
from ..forward.skeleton import Block, Skeleton
from ..forward.stream import Stream
from ..sums.taps import Seen, Tapped, Taps
from .fitting import Pupil, fit_block
from .pairs import CROSS_GRAM, Pairs
from .weights import MergedTensors, ModelTensors
from .zipping import Zipper, zip_settings

__all__ = ["MEASURES", "Measured", "Site"]


@dataclass
class Measured:
    """One of the models: its weights, and its data on their way through the blocks.

    Args:
        source: Its weights.
        folder: Its folder of statistics.
        merged: Its data in the merged model.
        own: Its data in the model itself; None if these are not needed.
        tensors: Description of the tensors that have statistics so far.
        latest: Description of those of the latest block.
    """

    source: ModelTensors
    folder: Path
    merged: Stream
    own: Stream | None
    tensors: dict[str, Any]
    latest: dict[str, Any] = field(default_factory=dict)

    @property
    def batches(self) -> Sequence[Batch]:
        """Its data."""
        return self.merged.batches

    @property
    def alone(self) -> Stream:
        """Its data in the model itself, for kinds of inputs that need them."""
        assert self.own is not None
        return self.own

    def to_json(self) -> dict[str, Any]:
        """Return its state as plain data."""
        own = None if self.own is None else self.own.state.to_json()
        return {"merged": self.merged.state.to_json(), "own": own, "tensors": self.tensors}


@dataclass(frozen=True)
class Site:
    """What a measure works with.

    Args:
        plan: The merge.
        skeleton: The merged model.
        merged: Its weights.
        statistics: Names of what is measured.
        models: The models in the order of the recipe.
    """

    plan: Plan
    skeleton: Skeleton
    merged: MergedTensors
    statistics: Sequence[str]
    models: list[Measured] = field(default_factory=list)


def _of_prefix(site: Site, block: Block) -> Iterator[list[Tapped]]:
    """Run the block of every model on what the merged blocks before compute."""
    for model in site.models:
        taps = Taps(site.skeleton, block, site.statistics)
        with site.skeleton.filled(block, model.source), taps.watching():
            for number, batch in enumerate(model.batches):
                taps.begin(batch)
                model.merged.output(number)
        yield taps.results()


def _of_merged(site: Site, block: Block) -> Iterator[list[Tapped]]:
    """Run the block as it is merged without statistics, and the models' own, and compare what their matrices get."""
    skeleton = site.skeleton
    outside = skeleton.loaded()
    site.merged.make(block.sources)
    with skeleton.filled(block, site.merged):
        merged = skeleton.loaded()
    for model in site.models:
        pairs = Pairs()
        sums = [name for name in site.statistics if name != CROSS_GRAM]
        of_merged = Taps(skeleton, block, sums, pairs.observe_merged)
        of_own = Taps(skeleton, block, [], pairs.observe_own)
        with skeleton.filled(block, model.source):
            # blocks read what these make of the tokens, or of the encoder's output
            skeleton.fill_outside(source=model.source)
            own = skeleton.loaded()
            for number, batch in enumerate(model.batches):
                skeleton.use(merged)
                with of_merged.watching():
                    of_merged.begin(batch)
                    model.merged.output(number)
                skeleton.use(own)
                with of_own.watching():
                    of_own.begin(batch)
                    model.alone.store(number, model.alone.output(number))
            model.alone.finish()
        skeleton.use(outside)
        yield pairs.added_to(skeleton, of_merged.results())


def _fitted(site: Site, block: Block) -> Iterator[list[Tapped]]:
    """Run the models' own block, and fit to what it computes what the merged block makes of the same data."""
    skeleton = site.skeleton
    outside = skeleton.loaded()
    pupils: list[Pupil] = []
    for model in site.models:
        with skeleton.filled(block, model.source):
            skeleton.fill_outside(source=model.source)
            model.alone.advance(lambda batch: None)
        pupils.append(Pupil(model.merged, model.alone))
    skeleton.use(outside)
    site.merged.make(block.sources)
    with skeleton.filled(block, site.merged):
        found = fit_block(site.plan, skeleton, block, site.merged.made, pupils)
    yield from found


def _of_mean(site: Site, block: Block) -> Iterator[list[Tapped]]:
    """Compare what the matrices of the block get in every model with the mean over all models."""
    pairs = [Pairs() for _ in site.models]
    seen: list[Seen] = [{} for _ in site.models]
    taps = [Taps(site.skeleton, block, [], partial(_see, own)) for own in seen]
    for _ in _run_together(site, block, taps):
        for parameter, call in seen[0]:
            each = [rows[parameter, call] for rows in seen]
            mean = torch.stack([rows.float() for rows in each]).mean(0)
            for pair, rows in zip(pairs, each, strict=True):
                pair.add(parameter, mean, rows)
        _forget(seen)
    for pair, tap in zip(pairs, taps, strict=True):
        yield pair.added_to(site.skeleton, tap.results())


def _zipped(site: Site, block: Block) -> Iterator[list[Tapped]]:
    """Put the hidden units of the block of all models in groups."""
    zipper = Zipper(site.skeleton, block, len(site.models))
    seen: list[Seen] = [{} for _ in site.models]
    taps = [Taps(site.skeleton, block, [], partial(_see, own)) for own in seen]
    for _ in _run_together(site, block, taps):
        zipper.add(seen)
        _forget(seen)
    yield from zipper.result(*zip_settings(site.plan, block))


def _run_together(site: Site, block: Block, taps: Sequence[Taps]) -> Iterator[None]:
    """Run the block of every model on what its own blocks before compute of the same tokens; yield after each batch."""
    skeleton, models = site.skeleton, site.models
    outside, weights = skeleton.loaded(), []
    for model in models:
        with skeleton.filled(block, model.source):
            skeleton.fill_outside(source=model.source)
            weights.append(skeleton.loaded())
    with skeleton.filled(block, models[0].source):
        for number in range(len(models[0].batches)):
            for model, own, tap in zip(models, weights, taps, strict=True):
                skeleton.use(own)
                with tap.watching():
                    tap.begin(model.batches[number])
                    model.alone.store(number, model.alone.output(number))
            yield
    for model in models:
        model.alone.finish()
    skeleton.use(outside)


def _see(seen: Seen, parameter: str, call: int, rows: Tensor) -> None:
    seen[parameter, call] = rows


def _forget(seen: Sequence[Seen]) -> None:
    for own in seen:
        own.clear()


MEASURES: Mapping[str, Callable[[Site, Block], Iterator[list[Tapped]]]] = {
    "prefix": _of_prefix,
    "merged": _of_merged,
    "fitted": _fitted,
    "mean": _of_mean,
    "zipped": _zipped,
}
"""Measure the statistics of a block, by the kind of inputs: yields those of each model in turn."""
