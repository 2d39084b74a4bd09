"""Calibrate within a merge: block by block, on what the merged blocks before compute.

For each block, the statistics of every model are measured, the block is merged with them, and the data of all models pass
through the merged block. Only one block of one model is in memory at a time (two for methods that compare the merged
model with the models), and the hidden states of all data are on disk. What is written are the statistics: a merge with
them computes the same blocks again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo, open_checkpoint
from ...checkpoint.formats.safetensors import read_header
from ...engine.finish import lay_out
from ...engine.plan.from_data import DataOfModels
from ...engine.plan.part import treatment_hash
from ...engine.plan.plan import Plan
from ...engine.record import fingerprint
from ...errors import RecipeError
from ...process import release_freed_memory
from ...recipe import Source
from ...statistics import COUNT, Statistics, TensorSums, open_statistics, sum_name
from ..data.batches import Batch
from ..forward.forward import check_streamable
from ..forward.skeleton import Block, Skeleton
from ..forward.stream import Stream, StreamState
from ..preparation import Prepared
from ..run import described, fits, without
from ..taps import Seen, Tapped, Taps
from ..target import Target
from ..writer import file_name, write_about, write_sums
from .fitting import Pupil, fit_block, sequences_of_step
from .pairs import CROSS_GRAM, Pairs
from .weights import MergedTensors, ModelTensors
from .zipping import Zipper, zip_settings

__all__ = ["Progress", "calibrate_within", "merge_identity", "merged_skeleton", "merged_sources"]

Progress = Callable[[int, int], None]
"""Called with the number of finished blocks and the number of all blocks."""

# folders of hidden states; no folder of a model begins with a dot
_HIDDEN, _OWN = ".hidden", ".own"


def calibrate_within(
    plan: Plan,
    models: Sequence[Prepared],
    out: str | Path,
    progress: Progress | None = None,
    *,
    names: Sequence[str] | None = None,
) -> list[Statistics]:
    """Measure the statistics that a method takes of inputs of merged blocks; the merge with them is the same as in here.

    An interrupted calibration continues at its block when it is called again with the same arguments.

    Args:
        plan: The merge, planned without its statistics from data: `build_plan(recipe, measured=False)`.
        models: The models in the order of the recipe, each with its data, from `prepare`.
        out: The folder to write, with a folder of statistics for every model. It must not exist.
        progress: Called with the number of finished blocks and of all blocks.
        names: Names of the models' folders; None for `model-1`, `model-2`, and so on.

    Returns:
        The statistics of each model.

    Raises:
        RecipeError: The method takes no such statistics, or one over the whole model.
        CheckpointError: A model is damaged or not finite.
        UnsupportedError: transformers does not know the merged model, or it cannot be run one block at a time.
        NonFiniteError: A block produces NaN or infinity.
        OutputError: `out` exists or cannot be written.
    """
    _check(plan, models)
    folders = names or [f"model-{k + 1}" for k in range(len(models))]
    with tempfile.TemporaryDirectory(prefix="merganser-") as root, Reader() as reader:
        checkpoints = [plan.checkpoints[source.model] for source in merged_sources(plan)]
        sources = [ModelTensors(checkpoint, reader) for checkpoint in checkpoints]
        with merged_skeleton(plan, Path(root, "merged")) as skeleton:
            merged = MergedTensors(plan)
            merged.make(skeleton.outside())
            skeleton.fill_outside(source=merged)
            check_streamable(skeleton, models[0].probe(), sources[0])
            statistics = _statistics(plan)
            about = [
                {
                    **model.about(),
                    "statistics": statistics,
                    "inputs": plan.method.data_inputs,
                    "merge": merge_identity(plan),
                    **({"batch_tokens": model.batch_tokens} if plan.method.data_inputs == "fitted" else {}),
                }
                for model in models
            ]
            settings = {"models": about, "batch_tokens": [model.batch_tokens for model in models]}
            with Target(Path(out), fingerprint(plan, settings)) as target:
                if not target.finished:
                    walk = _Walk(plan, skeleton, merged, target, statistics)
                    walk.open(models, sources, folders)
                    walk.run(progress)
                    walk.describe(about)
                target.publish([_HIDDEN, _OWN])
    return [open_statistics(Path(out, name)) for name in folders]


def _check(plan: Plan, models: Sequence[Prepared]) -> None:
    method, place = plan.method, plan.recipe.place
    if method.data_inputs == "own":
        raise RecipeError(
            f"{place}: {method.name} takes no statistics of inputs of merged blocks; calibrate its models"
        )
    if plan.whole_model:
        raise RecipeError(f"{place}: {method.name} measures the whole model first, so it cannot merge block by block")
    count = len(merged_sources(plan))
    if len(models) != count:
        raise RecipeError(f"{place}: {count} models are merged, {len(models)} have data")
    for source, model in zip(merged_sources(plan), models, strict=True):
        if method.reads_alike and not _same_tokens(models[0], model):
            raise RecipeError(
                f"{source.place}: {method.name} compares the models token by token, and {source.model} reads other tokens "
                "than the first model; give 'data' once, at the top of the recipe, for models with the same tokenizer"
            )


def _same_tokens(first: Prepared, other: Prepared) -> bool:
    return first.batch_tokens == other.batch_tokens and [own.stacks for own in first.samples] == [
        own.stacks for own in other.samples
    ]


def _statistics(plan: Plan) -> list[str]:
    return [COUNT, *dict.fromkeys(own.statistic for own in plan.method.from_data.values())]


def merge_identity(plan: Plan) -> str:
    """Return the hash of the merge that statistics belong to."""
    return treatment_hash(plan.tensors, plan.permutation)


def merged_sources(plan: Plan) -> list[Source]:
    """Return the models that are merged, without the base, in the order of the recipe."""
    return [source for source in plan.recipe.models if source.model != plan.recipe.base_model]


@contextmanager
def merged_skeleton(plan: Plan, folder: Path, dtype: torch.dtype | None = None) -> Iterator[Skeleton]:
    """Open the merged model without weights.

    Args:
        plan: The merge.
        folder: Where its config is written.
        dtype: Dtype in which it runs; None for its own.
    """
    lay_out(plan, folder)
    checkpoint = replace(open_checkpoint(str(folder)), reference="the merged model")
    with Skeleton(checkpoint, dtype) as skeleton:
        yield skeleton


@dataclass
class _Model:
    """One of the models: its weights, and its data on their way through the blocks.

    Args:
        source: Its weights.
        folder: Its folder of statistics.
        merged: Its data in the merged model.
        own: Its data in the model itself; None if the method does not compare the two.
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

    def to_json(self) -> dict[str, Any]:
        """Return its state as plain data."""
        own = None if self.own is None else self.own.state.to_json()
        return {"merged": self.merged.state.to_json(), "own": own, "tensors": self.tensors}


def _see(seen: Seen, parameter: str, call: int, rows: Tensor) -> None:
    seen[parameter, call] = rows


def _forget(seen: Sequence[Seen]) -> None:
    for own in seen:
        own.clear()


class _Walk:
    """The way of all data through the blocks."""

    def __init__(
        self, plan: Plan, skeleton: Skeleton, merged: MergedTensors, target: Target, statistics: Sequence[str]
    ) -> None:
        self._plan = plan
        self._skeleton = skeleton
        self._merged = merged
        self._target = target
        self._statistics = statistics
        self._count = len(skeleton.blocks)
        self._models: list[_Model] = []

    def open(self, models: Sequence[Prepared], sources: Sequence[ModelTensors], names: Sequence[str]) -> None:
        """Create the streams, or continue those of an interrupted run."""
        self._target.claim([f"{_HIDDEN}/", f"{_OWN}/", *(f"{name}/" for name in names)])
        most = sequences_of_step(self._plan) if self._plan.method.data_inputs == "fitted" else None
        states = self._target.state.get("models", [None] * len(models))
        for name, model, source, state in zip(names, models, sources, states, strict=True):
            batches = model.batches(most)
            folder = self._target.folder / name
            folder.mkdir(exist_ok=True)

            def stream(kind: str, name: str = name, batches: Sequence[Batch] = batches, state: Any = state) -> Stream:
                spool = self._target.folder / kind / name
                spool.mkdir(parents=True, exist_ok=True)
                key = "merged" if kind == _HIDDEN else "own"
                return Stream(self._skeleton, batches, spool, StreamState.from_json(state[key]) if state else None)

            compared = (
                CROSS_GRAM in self._statistics
                or self._plan.method.data_inputs == "fitted"
                or self._plan.method.reads_alike
            )
            own = stream(_OWN) if compared else None
            self._models.append(_Model(source, folder, stream(_HIDDEN), own, dict(state["tensors"]) if state else {}))

    def run(self, progress: Progress | None) -> None:
        """Measure and merge one block after the other."""
        measure = {
            "prefix": self._measure_prefix,
            "merged": self._measure_merged,
            "fitted": self._measure_fitted,
            "mean": self._measure_mean,
            "zipped": self._measure_zipped,
        }[self._plan.method.data_inputs]
        for index in range(int(self._target.state.get("done", 0)), self._count):
            if progress is not None:
                progress(index, self._count)
            block = self._skeleton.blocks[index]
            for model, collected in measure(block):
                model.latest = self._write(model.folder / file_name(index + 1, self._count), collected)
                model.tensors |= model.latest
            # nothing reads what the last block computes; models that are compared with each other read their own
            if index + 1 < self._count and not self._plan.method.reads_alike:
                self._merge(index, block)
            self._target.note({"done": index + 1, "models": [model.to_json() for model in self._models]})
            release_freed_memory()

    def _measure_prefix(self, block: Block) -> Iterator[tuple[_Model, list[Tapped]]]:
        """Run the block of every model on what the merged blocks compute."""
        for model in self._models:
            taps = Taps(self._skeleton, block, self._statistics)
            with self._skeleton.filled(block, model.source), taps.watching():
                for number, batch in enumerate(model.batches):
                    taps.begin(batch)
                    model.merged.output(number)
            yield model, taps.results()

    def _measure_merged(self, block: Block) -> Iterator[tuple[_Model, list[Tapped]]]:
        """Run the block as it is merged without statistics, and the models' own, and compare what their matrices get."""
        outside = self._skeleton.loaded()
        self._merged.make(block.sources)
        with self._skeleton.filled(block, self._merged):
            merged = self._skeleton.loaded()
        for model in self._models:
            pairs = Pairs()
            simple = [name for name in self._statistics if name != CROSS_GRAM]
            taps = Taps(self._skeleton, block, simple, pairs.observe_merged)
            with self._skeleton.filled(block, model.source):
                # blocks read what these make of the tokens, or of the encoder's output
                self._skeleton.fill_outside(source=model.source)
                own = self._skeleton.loaded()
                for number, batch in enumerate(model.batches):
                    self._skeleton.use(merged)
                    with taps.watching():
                        taps.begin(batch)
                        model.merged.output(number)
                    if model.own is not None:
                        self._skeleton.use(own)
                        self._compare(block, model.own, number, pairs)
                if model.own is not None:
                    model.own.finish()
            self._skeleton.use(outside)
            collected = taps.results()
            yield model, collected if model.own is None else pairs.added_to(self._skeleton, collected)

    def _compare(self, block: Block, own: Stream, number: int, pairs: Pairs) -> None:
        taps = Taps(self._skeleton, block, [], pairs.observe_own)
        with taps.watching():
            taps.begin(own.batches[number])
            own.store(number, own.output(number))

    def _measure_fitted(self, block: Block) -> Iterator[tuple[_Model, list[Tapped]]]:
        """Run the models' own block, and fit to what it computes what the merged block makes of the same data."""
        outside = self._skeleton.loaded()
        pupils: list[Pupil] = []
        for model in self._models:
            assert model.own is not None
            with self._skeleton.filled(block, model.source):
                self._skeleton.fill_outside(source=model.source)
                model.own.advance(lambda batch: None)
            pupils.append(Pupil(model.merged, model.own))
        self._skeleton.use(outside)
        self._merged.make(block.sources)
        with self._skeleton.filled(block, self._merged):
            found = fit_block(self._plan, self._skeleton, block, self._merged.made, pupils)
        yield from zip(self._models, found, strict=True)

    def _measure_mean(self, block: Block) -> Iterator[tuple[_Model, list[Tapped]]]:
        """Compare what the matrices of the block get in every model with the mean over all models."""
        pairs = [Pairs() for _ in self._models]
        seen: list[Seen] = [{} for _ in self._models]
        taps = [Taps(self._skeleton, block, [], partial(_see, own)) for own in seen]
        for _ in self._run_together(block, taps):
            for parameter, call in seen[0]:
                each = [rows[parameter, call] for rows in seen]
                mean = torch.stack([rows.float() for rows in each]).mean(0)
                for pair, rows in zip(pairs, each, strict=True):
                    pair.add(parameter, mean, rows)
            _forget(seen)
        for model, pair, tap in zip(self._models, pairs, taps, strict=True):
            yield model, pair.added_to(self._skeleton, tap.results())

    def _measure_zipped(self, block: Block) -> Iterator[tuple[_Model, list[Tapped]]]:
        """Put the hidden units of the block of all models in groups."""
        zipper = Zipper(self._skeleton, block, len(self._models))
        seen: list[Seen] = [{} for _ in self._models]
        taps = [Taps(self._skeleton, block, [], partial(_see, own)) for own in seen]
        for _ in self._run_together(block, taps):
            zipper.add(seen)
            _forget(seen)
        alpha, beta = zip_settings(self._plan, block)
        yield from zip(self._models, zipper.result(alpha, beta), strict=True)

    def _run_together(self, block: Block, taps: Sequence[Taps]) -> Iterator[None]:
        """Run the block of every model on what its own blocks before compute of the same tokens; yield after each batch."""
        outside, weights = self._skeleton.loaded(), []
        for model in self._models:
            with self._skeleton.filled(block, model.source):
                self._skeleton.fill_outside(source=model.source)
                weights.append(self._skeleton.loaded())
        with self._skeleton.filled(block, self._models[0].source):
            for number in range(len(self._models[0].batches)):
                for model, own, tap in zip(self._models, weights, taps, strict=True):
                    assert model.own is not None
                    self._skeleton.use(own)
                    with tap.watching():
                        tap.begin(model.batches[number])
                        model.own.store(number, model.own.output(number))
                yield
        for model in self._models:
            assert model.own is not None
            model.own.finish()
        self._skeleton.use(outside)

    def _merge(self, index: int, block: Block) -> None:
        """Merge the block with the statistics of all models, and run it on all data."""
        found = [self._latest(index, model) for model in self._models]
        self._merged.make(
            block.sources, DataOfModels(self._plan.method.from_data, {}, merged_sources(self._plan), found)
        )
        with self._skeleton.filled(block, self._merged):
            for model in self._models:
                model.merged.advance(lambda batch: None)

    def _write(self, file: Path, collected: Sequence[Tapped]) -> dict[str, Any]:
        """Write the sums of a block, and return the description of its tensors."""
        found = [tapped for tapped in collected if fits(self._skeleton, tapped)]
        write_sums(file, {sum_name(name, own.names[0]): each for own in found for name, each in own.sums.items()})
        return described(found)

    def _latest(self, index: int, model: _Model) -> Statistics:
        """Return the statistics of the block that was measured last, as they lie on disk."""
        infos: Sequence[TensorInfo] = read_header(model.folder / file_name(index + 1, self._count))[0]
        return Statistics(
            path=model.folder,
            about={},
            statistics=tuple(self._statistics),
            tensors={name: TensorSums(own["axis"], own["stored"]) for name, own in model.latest.items()},
            gradients={},
            sums={info.name: info for info in infos},
        )

    def describe(self, about: Sequence[Mapping[str, Any]]) -> None:
        """Write what the folders of all models hold."""
        files = [file_name(number, self._count) for number in range(1, self._count + 1)]
        for model, own in zip(self._models, about, strict=True):
            missing = without(self._skeleton, model.tensors)
            write_about(model.folder, {**own, "without": missing, "files": files, "tensors": model.tensors})
