"""What a fusion needs before the first step: the texts, the sources' predictions for them, and a plan of its costs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ...calibration.data.data import DataFile
from ...calibration.data.samples import first_samples
from ...calibration.single.preparation import read
from ...errors import DataError
from ...files import write_whole
from ...inference.stored import open_stored
from ...recipe.fields.data import Data
from ...statistics import Choice
from ..alignment.answers import Reading
from ..cache import cache_beginnings
from ..format import LogitCache, open_cache
from ..texts import cut_texts, plain, record_number, trimmed
from .fit import steps_of
from .recipe import DEBIASED, FusionRecipe
from .sequences import Alignment, Cached, Example, Teacher, cached_examples, reading_of, summary, teach
from .student import HeldOut, Student, load_held_out, open_student

__all__ = ["FusionPlan", "Preparation", "prepare_fusion"]

Progress = Callable[[str, int, int], None]
"""Called with what is done, the number of finished steps, and of all steps."""


@dataclass(frozen=True)
class FusionPlan:
    """What a fusion will do.

    Args:
        student: The student.
        parameters: Its parameters.
        trained: Those that are trained.
        sequences: Number of sequences, before those are left out that no source teaches.
        tokens: Their tokens; of caches, those of the sources.
        to_run: Tokens that each source is still to be run on, by its number; empty for caches.
        steps: Updates.
        tokens_per_step: Tokens of an update, on average.
        passes: How often each sequence is seen.
        memory: Estimated peak, in bytes: weights, gradients and moments of AdamW, logits, and lessons; activations are
            not in it.
        models: Number of models that are trained: the fused one, and the control.
    """

    student: str
    parameters: int
    trained: int
    sequences: int
    tokens: int
    to_run: dict[int, int]
    steps: int
    tokens_per_step: float
    passes: float
    memory: int
    models: int


@dataclass(frozen=True)
class Preparation:
    """An opened recipe; nothing is written, and no weights are read.

    Args:
        recipe: The recipe.
        student: The student.
        held_out: Texts to measure models on.
        caches: Of the sources, if the recipe names caches.
        texts: The lines of each set of data, if it names models.
        sets: For each source the number of its set.
        choices: How each set was drawn.
        cache_dir: Folder for models from the Hub.
    """

    recipe: FusionRecipe
    student: Student
    held_out: HeldOut
    caches: tuple[LogitCache, ...]
    texts: tuple[tuple[str, ...], ...]
    sets: tuple[int, ...]
    choices: tuple[Choice, ...]
    cache_dir: Path | None

    @property
    def words(self) -> torch.Tensor | None:
        """Which of the student's logits begin a word, bool, if chunks are debiased."""
        if self.recipe.chunks != DEBIASED:
            return None
        return torch.from_numpy(self.student.token_bytes.vocabulary().begin_words(self.student.size))

    def hashes(self) -> list[str]:
        """Return a hash of each source: of the cache, or of the model's files, which are read for it."""
        if self.recipe.from_caches:
            return [_hash(cache.about) for cache in self.caches]
        return [open_stored(own.name, cache_dir=self.cache_dir).hash for own in self.recipe.sources]

    def examples_of(self, files: list[Path]) -> list[Example]:
        """Return the sequences of the student, without lessons.

        Args:
            files: The files of the sets of data, if the recipe names models.
        """
        if self.recipe.from_caches:
            vocabulary = self.student.token_bytes.vocabulary()
            return [own for own in cached_examples(self.caches, vocabulary, self._read) if (own.labels >= 0).any()]
        # two sets may hold the same record
        found: dict[tuple[int, tuple[bytes, ...]], Example] = {}
        opened = self.student.opened
        for file, choice in zip(files, self.choices, strict=True):
            data = read([file])
            records = {record.where: record_number(record) for each in data for record in each.records}
            for sample in first_samples(data, opened.tokenizer, opened.config, choice):
                reading = reading_of(sample, self.student.token_bytes.text_and_ends)
                own = Example(records[sample.where], reading)
                found.setdefault((own.record, reading.answers()), own)
        return [own for own in found.values() if (own.labels >= 0).any()]

    def _read(self, said: Cached) -> Reading | None:
        """Read the text of a cached sequence as the student does.

        Raises:
            DataError: The sequence has special tokens between its texts, as a conversation has, or not all tokens count.
        """
        reading = said.reading
        widths = [stop - start for start, stop in zip([0, *reading.ends.tolist()], reading.ends.tolist(), strict=False)]
        inner = [number for number, width in enumerate(widths) if width]
        if not inner or 0 in widths[inner[0] : inner[-1]] or not reading.counted.all():
            raise DataError(
                f"{self.recipe.place}: a cache of a model with other tokens holds prompts or conversations, which the student "
                "writes in its own way; name the model and its data instead of the cache"
            )
        text, start = trimmed(reading.text)
        if reading.text[start : start + len(text)] != text or not text.strip():
            return None
        opened = self.student.opened
        ids = [*opened.tokenizer.prefix, *opened.tokenizer.ids(text.decode())][: opened.positions]
        own, ends = self.student.token_bytes.text_and_ends(ids)
        return Reading(np.array(ids), np.array(ends, np.int64), np.ones(len(ids), np.bool_), own)

    def write_texts(self, folder: Path) -> list[Path]:
        """Write the sets of data as files, for all models to read."""
        files = [folder / f"texts-{number}.jsonl" for number in range(len(self.texts))]
        for file, lines in zip(files, self.texts, strict=True):
            write_whole(file, "".join(f"{line}\n" for line in lines), temporary=file.with_name(f".{file.name}.new"))
        return files

    def make_caches(self, folder: Path, files: list[Path], progress: Progress) -> tuple[LogitCache, ...]:
        """Run every source on its texts, or open what an earlier run wrote.

        Args:
            folder: Folder for the caches.
            files: The files of the sets.
            progress: Called as the sources run.

        Raises:
            MergeError: A source cannot be run.
        """
        found: list[LogitCache] = []
        for number, source in enumerate(self.recipe.sources):
            out = folder / str(number)
            if not out.exists():
                own = self.sets[number]
                cache_beginnings(
                    source.name,
                    [files[own]],
                    out,
                    k=self.recipe.top if self.recipe.loss != "alm" else 1,
                    tokens=self.choices[own].tokens,
                    cache_dir=self.cache_dir,
                    progress=lambda done, count, name=source.name: progress(f"running {name}", done, count),  # type: ignore[misc]
                )
            found.append(open_cache(out))
        return tuple(found)

    def teach(self, examples: list[Example], caches: tuple[LogitCache, ...], progress: Progress) -> dict[str, Any]:
        """Add the lessons of all sources; return how much each of them teaches.

        Raises:
            DataError: A source teaches nothing.
        """
        recipe = self.recipe
        alignment = Alignment(
            recipe.loss,
            recipe.align,
            recipe.chunks,
            recipe.threshold,
            self.student.token_bytes.vocabulary(),
            self.student.size,
        )
        teachers = [
            Teacher(number, cache, alignment, lambda done, count: progress("comparing tokens", done, count))
            for number, cache in enumerate(caches)
        ]
        teach(examples, teachers, lambda done, count: progress("aligning", done, count))
        found = summary(examples, len(teachers))
        for source, taught in zip(recipe.sources, found["taught"], strict=True):
            if not taught:
                answers = bool(self.choices) and all(own.tokens == "completions" for own in self.choices)
                raise DataError(
                    f"{source.place}: {source.name} teaches nothing: none of its texts is read by the student in the same way; "
                    + (
                        "a chat template changes the answers themselves, or other tokens are cut off"
                        if answers
                        else "where chat templates differ, set tokens: completions"
                    )
                )
        return found

    def plan(self, *, control: bool = True) -> FusionPlan:
        """Return what the fusion will do, without running a source."""
        recipe, student = self.recipe, self.student
        if recipe.from_caches:
            sequences = max(int(cache.total("sequences")) for cache in self.caches)
            tokens = max(int(cache.total("tokens")) for cache in self.caches)
            to_run: dict[int, int] = {}
            longest = max(int(part["length"]) for cache in self.caches for part in cache.about["parts"])
        else:
            sizes = [sum(len(student.opened.tokenizer.ids(plain(line))) for line in own) for own in self.texts]
            sequences, tokens = sum(map(len, self.texts)), sum(sizes)
            to_run = {number: sizes[own] for number, own in enumerate(self.sets)}
            longest = max(choice.length or 0 for choice in self.choices)
        model = student.without_weights()
        parameters = model.num_parameters()
        trained = parameters if recipe.lora is None else _lora_parameters(model, recipe.lora.rank)
        steps, batch = steps_of(recipe, sequences), recipe.training.batch
        rows = batch // recipe.training.accumulate * longest
        per_token = 0 if recipe.loss == "alm" else 8 * (self.caches[0].k if self.caches else recipe.top) + 12
        memory = 4 * parameters + 12 * trained + 3 * 4 * rows * student.size + tokens * (per_token + 40)
        return FusionPlan(
            recipe.student,
            parameters,
            trained,
            sequences,
            tokens,
            to_run,
            steps,
            batch * tokens / max(1, sequences),
            steps * batch / max(1, sequences),
            memory,
            1 + control,
        )


def _lora_parameters(model: Any, rank: int) -> int:
    """Return the number of parameters of low-rank updates of all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [own for own in model.modules() if isinstance(own, torch.nn.Linear) and own is not head]
    return sum(rank * (own.in_features + own.out_features) for own in layers)


def prepare_fusion(recipe: FusionRecipe, stack: ExitStack, *, cache_dir: Path | None = None) -> Preparation:
    """Open everything that a recipe names, and read and cut its data.

    Raises:
        MergeError: A model, cache or file is missing or not valid.
    """
    student = open_student(recipe.student, stack, cache_dir=cache_dir)
    held_out = load_held_out(recipe.held_out, recipe.held_out_windows)
    if recipe.from_caches:
        caches = tuple(open_cache(source.name) for source in recipe.sources)
        return Preparation(recipe, student, held_out, caches, (), (), (), cache_dir)
    distinct: list[Data] = []
    sets: list[int] = []
    for source in recipe.sources:
        assert source.data is not None
        same = [(own.source, own.choice) for own in distinct]
        wanted = source.data.source, source.data.choice
        if wanted not in same:
            distinct.append(source.data)
            same.append(wanted)
        sets.append(same.index(wanted))
    choices = tuple(own.choice.for_model(student.opened.positions) for own in distinct)
    files = [read(own.source) for own in distinct]
    texts = tuple(tuple(_cut(student, own, choice)) for own, choice in zip(files, choices, strict=True))
    for own in recipe.sources:
        # report missing files before anything runs
        open_stored(own.name, cache_dir=cache_dir)
    return Preparation(recipe, student, held_out, (), texts, tuple(sets), choices, cache_dir)


def _cut(student: Student, files: list[DataFile], choice: Choice) -> list[str]:
    opened = student.opened
    return list(dict.fromkeys(cut_texts(files, opened.tokenizer, student.token_bytes, opened.config, choice)))


def _hash(about: Any) -> str:
    return xxhash.xxh3_128_hexdigest(repr(sorted((key, repr(value)) for key, value in about.items())).encode())
