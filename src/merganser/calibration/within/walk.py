"""Calibrate within a merge: block by block, on what the merged blocks before compute.

For each block, the statistics of every model are measured, the block is merged with them, and the data of all models pass
through the merged block. Only one block of one model is in memory at a time (two for methods that compare the merged
model with the models), and the hidden states of all data are on disk. What is written are the statistics: a merge with
them computes the same blocks again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import Reader, TensorInfo
from ...checkpoint.formats.safetensors import read_header
from ...engine.plan.from_data import DataOfModels
from ...engine.plan.plan import Plan
from ...engine.record import fingerprint
from ...errors import RecipeError
from ...process import release_freed_memory
from ...statistics import COUNT, Statistics, TensorSums, open_statistics, sum_name
from ..data.batches import Batch
from ..forward.forward import check_streamable
from ..forward.skeleton import Block
from ..forward.stream import Stream, StreamState
from ..output.target import Target
from ..output.writer import file_name, write_about, write_sums
from ..single.preparation import Prepared
from ..single.run import Progress, described, fits, without
from ..sums.taps import Tapped
from .fitting import sequences_of_step
from .measures import MEASURES, Measured, Site
from .merged import merge_identity, merged_models, merged_skeleton, merged_sources
from .weights import MergedTensors, ModelTensors

__all__ = ["calibrate_within"]

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
        sources = [ModelTensors(model, reader) for model in merged_models(plan)]
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
                    walk = _Walk(Site(plan, skeleton, merged, statistics), target)
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


class _Walk:
    """The way of all data through the blocks."""

    def __init__(self, site: Site, target: Target) -> None:
        self._site = site
        self._target = target
        self._count = len(site.skeleton.blocks)

    def open(self, models: Sequence[Prepared], sources: Sequence[ModelTensors], names: Sequence[str]) -> None:
        """Create the streams, or continue those of an interrupted run."""
        self._target.claim([f"{_HIDDEN}/", f"{_OWN}/", *(f"{name}/" for name in names)])
        inputs = self._site.plan.method.data_inputs
        most = sequences_of_step(self._site.plan) if inputs == "fitted" else None
        states = self._target.state.get("models", [None] * len(models))
        for name, model, source, state in zip(names, models, sources, states, strict=True):
            (self._target.folder / name).mkdir(exist_ok=True)
            batches = model.batches(most)
            merged = self._stream(_HIDDEN, name, batches, state and state["merged"])
            own = self._stream(_OWN, name, batches, state and state["own"]) if inputs != "prefix" else None
            tensors = dict(state["tensors"]) if state else {}
            self._site.models.append(Measured(source, self._target.folder / name, merged, own, tensors))

    def _stream(self, kind: str, name: str, batches: Sequence[Batch], state: Any) -> Stream:
        spool = self._target.folder / kind / name
        spool.mkdir(parents=True, exist_ok=True)
        return Stream(self._site.skeleton, batches, spool, StreamState.from_json(state) if state else None)

    def run(self, progress: Progress | None) -> None:
        """Measure and merge one block after the other."""
        site = self._site
        measure = MEASURES[site.plan.method.data_inputs]
        for index in range(int(self._target.state.get("done", 0)), self._count):
            if progress is not None:
                progress(index, self._count)
            block = site.skeleton.blocks[index]
            for model, collected in zip(site.models, measure(site, block), strict=True):
                model.latest = self._write(model.folder / file_name(index + 1, self._count), collected)
                model.tensors |= model.latest
            # nothing reads what the last block computes; models that are compared with each other read their own
            if index + 1 < self._count and not site.plan.method.reads_alike:
                self._merge(index, block)
            self._target.note({"done": index + 1, "models": [model.to_json() for model in site.models]})
            release_freed_memory()

    def _merge(self, index: int, block: Block) -> None:
        """Merge the block with the statistics of all models, and run it on all data."""
        site = self._site
        found = [self._latest(index, model) for model in site.models]
        data = DataOfModels(site.plan.method.from_data, {}, merged_sources(site.plan), found)
        site.merged.make(block.sources, data)
        with site.skeleton.filled(block, site.merged):
            for model in site.models:
                model.merged.advance(lambda batch: None)

    def _write(self, file: Path, collected: Sequence[Tapped]) -> dict[str, Any]:
        """Write the sums of a block, and return the description of its tensors."""
        found = [tapped for tapped in collected if fits(self._site.skeleton, tapped)]
        write_sums(file, {sum_name(name, own.names[0]): each for own in found for name, each in own.sums.items()})
        return described(found)

    def _latest(self, index: int, model: Measured) -> Statistics:
        """Return the statistics of the block that was measured last, as they lie on disk."""
        infos: Sequence[TensorInfo] = read_header(model.folder / file_name(index + 1, self._count))[0]
        return Statistics(
            path=model.folder,
            about={},
            statistics=tuple(self._site.statistics),
            tensors={name: TensorSums(own["axis"], own["stored"]) for name, own in model.latest.items()},
            gradients={},
            sums={info.name: info for info in infos},
        )

    def describe(self, about: Sequence[Mapping[str, Any]]) -> None:
        """Write what the folders of all models hold."""
        files = [file_name(number, self._count) for number in range(1, self._count + 1)]
        for model, own in zip(self._site.models, about, strict=True):
            missing = without(self._site.skeleton, model.tensors)
            write_about(model.folder, {**own, "without": missing, "files": files, "tensors": model.tensors})
