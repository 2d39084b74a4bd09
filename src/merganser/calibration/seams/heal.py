"""Heal the seams of a stacked model: fit single matrices, so that layers receive what they received in their own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...engine.new_tensors import TensorSpool, copied_from
from ...engine.output.beside import folder_beside
from ...engine.output.staging import check_target
from ...engine.plan.part import place
from ...engine.plan.sections.healing import HealingSummary
from ...engine.planner.planner import build_plan
from ...engine.run import Progress as RunProgress
from ...engine.run import Result, run_plan
from ...errors import DataError, suggest_keywords
from ...jsonfile import Entry, read_object
from ...process import release_freed_memory
from ...recipe import load_recipe
from ...record import RECORD_NAME
from ...statistics import Choice
from ...statistics.choice import BATCH_TOKENS
from ..data.batches import longest_first
from ..forward.stream import Stream
from .fit import choose, find_writer, measure
from .measure import Opened, Progress, opened, steps
from .places import Seam
from .states import Kept, Likelihood, blocks_to, likelihood, run_and_keep, start

__all__ = ["Healing", "heal"]

_HELD = 4
"""One in so many sequences is held out."""


@dataclass(frozen=True)
class Healing:
    """What healing a stacked model did.

    Args:
        out: The folder that was written; None if the model has no seam, or no fit helped.
        seams: The seams of the stacked model.
        tensors: For each tensor that was fitted, its name, the ridge, and the error of what its block passes on, on
            held-out text, before and after: squared, relative, the mean over tokens.
        skipped: Blocks whose last matrix could not be fitted, and why.
        perplexity: Perplexity of the stacked model on held-out text; None without seams.
        healed: The same of the healed one; None if nothing was fitted.
        result: Of writing.
    """

    out: Path | None
    seams: Sequence[Seam]
    tensors: Sequence[Mapping[str, Any]]
    skipped: Mapping[str, str]
    perplexity: float | None
    healed: float | None
    result: Result | None


@suggest_keywords
def heal(
    stacked: str | Path,
    data: Any,
    out: str | Path,
    *,
    blocks: int | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    overwrite: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    writing: RunProgress | None = None,
) -> Healing:
    """Fit matrices of a stacked model at its seams and after them to what the models that it came from compute.

    The last matrix of the block before a seam, and of blocks after it, is changed by ridge regression in float64, so that
    what the block passes on is closest to what its next layer received in its own model, on the same text. Every fourth
    sequence is held out: a fit stays only if it lowers the error there, too, and a model is written only if the perplexity
    on the held-out text is lower than before. Names and shapes of tensors do not change.

    Args:
        stacked: Folder of a model that was merged with slices.
        data: Files of text, or a data set, as for `merganser.calibration.calibrate`.
        out: Target folder; it appears when it is complete.
        blocks: Number of blocks after each seam that are fitted, besides the one before it; None for all up to the next.
        sequences: As for `calibrate`.
        length: As for `calibrate`.
        seed: As for `calibrate`.
        batch_tokens: As for `calibrate`.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished blocks, and of all blocks.
        writing: Receives reports of the writing.

    Raises:
        MergeError: As for `inspect_seams`, or the target cannot be written.
    """
    target = Path(out)
    check_target(target, overwrite=overwrite)
    if blocks is not None and blocks < 0:
        raise DataError(f"blocks: must be at least 0, found {blocks}")
    choice = Choice(sequences, length, seed)
    with opened(stacked, data, choice, batch_tokens=batch_tokens, cache_dir=cache_dir) as found:
        if not found.seams:
            return Healing(out=None, seams=(), tensors=(), skipped={}, perplexity=None, healed=None, result=None)
        if len(found.stack.samples) < _HELD:
            raise DataError(
                f"{stacked}: healing needs {_HELD} sequences at least, of which one in {_HELD} is held out; the data give "
                f"{len(found.stack.samples)}: give more text, or a smaller length"
            )
        with folder_beside(target, "healing") as folder:
            (folder / "made").mkdir()
            spool = TensorSpool(folder / "made")
            fitted = _Fitting(found, folder, spool, blocks, progress)
            fitted.run()
            before, after = fitted.perplexities()
            if not fitted.tensors or not after < before:
                return fitted.healing(before, after if fitted.tensors else None)
            summary = HealingSummary(
                recipe=_recipe(Path(stacked)),
                tensors=fitted.tensors,
                perplexity=before,
                healed=after,
                data=found.stack.part(),
                digest=spool.digest,
            )
            result = _write(str(stacked), target, spool, summary, overwrite, cache_dir, writing)
            return fitted.healing(before, after, result)


class _Fitting:
    """Fitting the blocks of a stacked model, one after the other."""

    def __init__(
        self, found: Opened, folder: Path, spool: TensorSpool, blocks: int | None, progress: Progress | None
    ) -> None:
        self._found = found
        self._folder = folder
        self._spool = spool
        self._goals = _goals(found, blocks)
        self._boundaries: dict[str, set[int]] = {}
        for name, boundary in self._goals.values():
            self._boundaries.setdefault(name, set()).add(boundary)
        runs = [blocks_to(found.models[name], own) for name, own in self._boundaries.items()]
        # the stack runs twice: as it is, and fitted
        self._step = steps(progress, sum(runs) + 2 * len(found.stack.skeleton.blocks))
        self._batches = found.stack.batches()
        self._held = _held_out(found)
        self._likelihoods: list[Likelihood] = []
        self.tensors: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}

    def run(self) -> None:
        """Run the models, then the stack as it is, then the stack with fits."""
        kept: dict[str, Kept] = {}
        for number, (name, boundaries) in enumerate(self._boundaries.items()):
            model = self._found.models[name]
            start(model)
            kept[name] = run_and_keep(model, boundaries, self._folder / str(number), to_end=False, progress=self._step)
        stack = self._found.stack
        start(stack)
        plain = run_and_keep(stack, (), self._folder / "plain", progress=self._step)
        assert plain.likelihood is not None
        (self._folder / "healed").mkdir()
        stream = Stream(stack.skeleton, self._batches, self._folder / "healed")
        for index, block in enumerate(stack.skeleton.blocks):
            with stack.skeleton.filled(block):
                if index in self._goals:
                    model_name, boundary = self._goals[index]
                    self._fit(index, stream, kept[model_name], boundary)
                stream.advance(lambda batch: None)
            release_freed_memory()
            self._step()
        self._likelihoods = [plain.likelihood, likelihood(stack.skeleton, self._batches, stream)]

    def _fit(self, index: int, stream: Stream, expected: Kept, boundary: int) -> None:
        """Fit the next block of the stream, and use the fitted weight in it."""
        skeleton = self._found.stack.skeleton
        name = skeleton.blocks[index].name
        writer = find_writer(skeleton, index, stream)
        if writer is None:
            self.skipped[name] = "the product of its last matrix is not simply added to what it passes on"
            return
        fitted, held = measure(writer, stream, expected, boundary, self._held)
        info = skeleton.checkpoint.tensors[writer.name]
        best = choose(writer, fitted, held, getattr(torch, info.dtype.name))
        if best is None:
            self.skipped[name] = "no fit is closer on held-out text"
            return
        with torch.no_grad():
            writer.module.get_parameter("weight").copy_(best.weight)
        self._spool.add({writer.name: best.weight.contiguous()})
        self.tensors.append({"name": writer.name, "ridge": best.ridge, "before": best.before, "after": best.after})

    def healing(self, before: float, after: float | None, result: Result | None = None) -> Healing:
        """Return what was done, with the perplexities before and after, and the result of writing, if it was written."""
        return Healing(
            out=None if result is None else result.out,
            seams=self._found.seams,
            tensors=self.tensors,
            skipped=self.skipped,
            perplexity=before,
            healed=after,
            result=result,
        )

    def perplexities(self) -> tuple[float, float]:
        """Return the perplexities on held-out text of the stack as it is and of the fitted one."""
        held = [out for each in self._held for out in each]
        chosen = [number for number, out in enumerate(held) if out]
        before, after = (own.perplexity(chosen) for own in self._likelihoods)
        return before, after


def _goals(found: Opened, blocks: int | None) -> dict[int, tuple[str, int]]:
    """Return for each block to fit the model, and the boundary in it, whose hidden states it should pass on."""
    own = [(piece.model, layer + 1) for piece in found.pieces for layer in piece.layers]
    count = len(found.stack.skeleton.blocks)
    positions = [seam.position for seam in found.seams]
    goals: dict[int, tuple[str, int]] = {}
    for seam, following in zip(found.seams, [*positions[1:], count], strict=True):
        if seam.position > 0:
            goals[seam.position - 1] = (seam.model, seam.layer)
        end = following if blocks is None else min(following, seam.position + blocks)
        goals |= {position: own[position] for position in range(seam.position, end)}
    return goals


def _held_out(found: Opened) -> list[list[bool]]:
    """Return for each batch which of its sequences are held out: every fourth in the order of the draw."""
    order = iter(longest_first(found.stack.samples))
    return [[next(order) % _HELD == _HELD - 1 for _ in batch.where] for batch in found.stack.batches()]


def _recipe(stacked: Path) -> str:
    """Return the recipe that stacked a model, of the model itself or of what it was healed from."""
    root = Entry(read_object(stacked / RECORD_NAME), str(stacked / RECORD_NAME))
    healed = root.get("healed")
    return (root if healed is None else healed)["recipe"].text()


def _write(
    stacked: str,
    target: Path,
    spool: TensorSpool,
    summary: HealingSummary,
    overwrite: bool,
    cache_dir: Path | None,
    progress: RunProgress | None,
) -> Result:
    """Write the plan of a copy, with the fitted tensors in place of those of the stacked model."""
    recipe = load_recipe({"merge_method": "passthrough", "models": [{"model": {"path": stacked}}]})
    plan = build_plan(recipe, cache_dir=cache_dir)
    (checkpoint,) = plan.checkpoints.values()
    tensors = [
        copied_from(own, spool.planned(own.name, checkpoint.tensors[own.name], own.dtype, "after healing"))
        if own.name in spool.tensors
        else replace(own)
        for own in plan.tensors
    ]
    plan = replace(plan, tensors=place(tensors, plan.shards), healing=summary)
    return run_plan(plan, target, overwrite=overwrite, progress=progress)
