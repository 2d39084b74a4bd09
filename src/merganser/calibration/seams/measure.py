"""Look at the seams of a stacked model: what layers after them receive on text, and what they received where they came from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, suggest_keywords
from ...statistics import Choice
from ...statistics.choice import BATCH_TOKENS
from ..data.batches import Batch
from ..single.preparation import Data, Prepared, prepare
from .places import Piece, Seam, find_pieces, find_seams
from .states import Kept, run_and_keep, start

__all__ = ["Opened", "SeamReport", "SeamState", "inspect_seams", "opened"]

Progress = Callable[[int, int], None]
"""Called with the number of finished blocks, and of all blocks of all models."""

_SAME = 1e-5
"""Largest relative error of hidden states that count as equal: rounding in float32."""


@dataclass(frozen=True)
class SeamState:
    """What a seam does to hidden states, as medians over the tokens that count.

    Args:
        seam: The seam.
        norm: Norm of what the layer after the seam receives.
        expected_norm: Norm of what it received in its own model, on the same text.
        error: Norm of the difference of the two, over `expected_norm`.
        cosine: Their cosine.
        norm_after: Norm of what that layer passes on; None for the final norm.
        expected_norm_after: The same in its own model.
        step: Norm of the change that the layer makes in its own model, over `expected_norm`; for the final norm, that of
            the layer before it there.
    """

    seam: Seam
    norm: float
    expected_norm: float
    error: float
    cosine: float
    norm_after: float | None
    expected_norm_after: float | None
    step: float

    @property
    def blocks(self) -> float:
        """The difference at the seam, divided by the change that one block makes."""
        return self.error / self.step if self.step > 0 else float("inf") if self.error > 0 else 0.0

    @property
    def verdict(self) -> str:
        """What the numbers say, in a word: "none", "small" or "large"."""
        if self.error <= _SAME:
            return "none"
        return "small" if self.blocks <= 1 else "large"


@dataclass(frozen=True)
class SeamReport:
    """The seams of a stacked model.

    Args:
        out: Folder of the model.
        seams: Its seams, in order.
        perplexity: Perplexity of the model.
        models: Perplexities of the models that it is stacked from, by name.
        sequences: Number of sequences of the text.
        tokens: Number of tokens that count.
    """

    out: Path
    seams: Sequence[SeamState]
    perplexity: float
    models: Mapping[str, float]
    sequences: int
    tokens: int

    @property
    def best(self) -> str:
        """The model with the lowest perplexity of those that it is stacked from."""
        return min(self.models, key=self.models.__getitem__)

    @property
    def verdict(self) -> str:
        """A sentence on the model as a whole."""
        ratio = self.perplexity / self.models[self.best]
        if not self.seams:
            return "there is no seam: every layer follows on the one that it followed on in its model"
        if ratio <= 1:
            return f"the stack predicts this text no worse than {self.best}, the best of its models"
        return f"the stack's perplexity is {ratio:.2f} times that of {self.best}, the best of its models"


@dataclass(frozen=True)
class Opened:
    """A stacked model and the models it came from, with the same text.

    Args:
        stack: The stacked model.
        models: The models that its layers came from, by name.
        pieces: Its pieces.
        seams: Its seams.
    """

    stack: Prepared
    models: Mapping[str, Prepared]
    pieces: Sequence[Piece]
    seams: Sequence[Seam]

    @property
    def blocks(self) -> int:
        """Number of blocks of all models together."""
        return sum(len(own.skeleton.blocks) for own in (self.stack, *self.models.values()))


@contextmanager
def opened(
    out: str | Path,
    data: Data,
    choice: Choice,
    *,
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
) -> Iterator[Opened]:
    """Open a stacked model and the models that its recipe names; all run in float32.

    Raises:
        RecipeError: The recipe stacks no layers.
        CheckpointError: The run record or a model is missing or damaged, or a model reads the text as other tokens.
        DataError: The data, or the choice, are not valid.
        UnsupportedError: A model cannot be run block by block.
    """
    folder = Path(out)
    pieces = find_pieces(folder)
    given: dict[str, Any] = {"statistics": (), "batch_tokens": batch_tokens, "cache_dir": cache_dir}
    with ExitStack() as stack:

        def ready(model: str, choice: Choice) -> Prepared:
            return stack.enter_context(prepare(model, data, choice=choice, dtype=torch.float32, **given))

        own = ready(str(out), choice)
        models = {name: ready(name, own.choice) for name in dict.fromkeys(piece.model for piece in pieces)}
        for name, model in models.items():
            if [each.stacks for each in model.samples] != [each.stacks for each in own.samples]:
                raise CheckpointError(
                    f"{name}: reads the text as other tokens than {out}, so what their layers receive cannot be compared"
                )
        depths = {name: len(model.skeleton.blocks) for name, model in models.items()}
        for piece in pieces:
            if piece.layers[-1] >= depths[piece.model]:
                raise CheckpointError(
                    f"{piece.model}: has {depths[piece.model]} layers, and the recipe of {out} takes layer "
                    f"{piece.layers[-1]} of it; the model was changed since"
                )
        count = pieces[-1].first + len(pieces[-1].layers)
        if len(own.skeleton.blocks) != count:
            raise CheckpointError(
                f"{out}: has {len(own.skeleton.blocks)} layers, and its recipe stacks {count}; it was changed since"
            )
        yield Opened(own, models, pieces, find_seams(pieces, depths.__getitem__))


@suggest_keywords
def inspect_seams(
    out: str | Path,
    data: Data,
    *,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> SeamReport:
    """Compare what layers of a stacked model receive after its seams with what they received in their own models.

    The models run one after the other, a block at a time, in float32; hidden states at seams are on disk meanwhile.

    Args:
        out: Folder of a model that was merged with slices; its run record says from what.
        data: Files of text, or a data set, as for `merganser.calibration.calibrate`.
        sequences: As for `calibrate`.
        length: As for `calibrate`.
        seed: As for `calibrate`.
        batch_tokens: As for `calibrate`.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished blocks, and of all blocks.

    Raises:
        RecipeError: The recipe stacks no layers.
        CheckpointError: The run record or a model is missing or damaged, or a model reads the text as other tokens.
        DataError: The data, or the options for them, are not valid.
        UnsupportedError: A model cannot be run block by block.
        NonFiniteError: A model produces NaN or infinity.
        OutputError: The disk for hidden states is full.
    """
    choice = Choice(sequences, length, seed)
    with (
        opened(out, data, choice, batch_tokens=batch_tokens, cache_dir=cache_dir) as found,
        tempfile.TemporaryDirectory(prefix="merganser-") as root,
    ):
        step = steps(progress, found.blocks)
        kept: dict[str, Kept] = {}
        for number, (name, model) in enumerate(found.models.items()):
            own = [seam for seam in found.seams if seam.model == name]
            start(model)
            depth = len(model.skeleton.blocks)
            wanted = {boundary for seam in own for boundary in _around(seam.layer, depth)}
            kept[name] = run_and_keep(model, wanted, Path(root, str(number)), progress=step)
        start(found.stack)
        count = len(found.stack.skeleton.blocks)
        positions = {boundary for seam in found.seams for boundary in (seam.position, min(seam.position + 1, count))}
        stack = run_and_keep(found.stack, positions, Path(root, "stack"), progress=step)
        batches = found.stack.batches()
        states = [_compare(seam, stack, kept[seam.model], batches, count) for seam in found.seams]
        assert stack.likelihood is not None
        return SeamReport(
            out=Path(out),
            seams=states,
            perplexity=stack.likelihood.perplexity(),
            models={n: own.likelihood.perplexity() for n, own in kept.items() if own.likelihood is not None},
            sequences=len(found.stack.samples),
            tokens=found.stack.counted,
        )


def steps(progress: Progress | None, count: int) -> Callable[[], None]:
    """Return a function that counts finished blocks, and reports their number."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, count)

    return step


def _around(layer: int, depth: int) -> tuple[int, int]:
    """Return the boundaries before and after a layer, or the last one of the model for the final norm."""
    return (layer, layer + 1) if layer < depth else (layer - 1, layer)


def _compare(seam: Seam, stack: Kept, model: Kept, batches: Sequence[Batch], count: int) -> SeamState:
    final = seam.position == count
    near, far = (seam.layer - 1, seam.layer) if final else (seam.layer, seam.layer + 1)
    columns: dict[str, list[Tensor]] = {}

    def note(**values: Tensor) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    for batch in batches:
        found, expected = (own.read(at, batch).double() for own, at in ((stack, seam.position), (model, seam.layer)))
        size = expected.norm(dim=1)
        floor = size.clamp(min=1e-30)
        change = (model.read(far, batch).double() - model.read(near, batch).double()).norm(dim=1)
        note(
            norm=found.norm(dim=1),
            expected_norm=size,
            error=(found - expected).norm(dim=1) / floor,
            cosine=torch.cosine_similarity(found, expected, dim=1),
            step=change / floor,
        )
        if not final:
            note(
                norm_after=stack.read(seam.position + 1, batch).double().norm(dim=1),
                expected_norm_after=model.read(far, batch).double().norm(dim=1),
            )
    middle = {name: torch.cat(values).median().item() for name, values in columns.items()}
    return SeamState(
        seam=seam,
        norm=middle["norm"],
        expected_norm=middle["expected_norm"],
        error=middle["error"],
        cosine=middle["cosine"],
        norm_after=middle.get("norm_after"),
        expected_norm_after=middle.get("expected_norm_after"),
        step=middle["step"],
    )
