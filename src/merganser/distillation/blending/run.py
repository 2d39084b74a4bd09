"""Blend answers: the run, one model after another, from what an earlier run kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ...engine.kernels.devices import resolve_devices
from ...engine.output.failure import failures_of
from ...errors import DataError, OutputError, suggest_keywords
from ...evaluation.roster import Models, make_roster
from ...evaluation.scoring.journal import Journal, journal_path
from ...files import write_whole
from ...inference.language_model import LanguageModel, Tokenizer, open_model
from ...inference.sources import Reference, open_source
from ...inference.stored import hash_of
from ...jsonfile import os_reason
from ...process import release_freed_memory
from ...version import __version__
from .fuser import Fuser
from .generation import BATCH_TOKENS, Answer, Sampling, Speaker, check_speaker, grouped
from .prompts import Prompt, Task, number_of, read_prompts, tokens_of
from .ranking import CommandRanker, Ranker, open_reward_model
from .summary import Blended, Line, Scored, summarise

__all__ = ["blend_answers"]

Progress = Callable[[str, int, int], None]
"""Called with what is done, the number of finished prompts, and of all."""


@suggest_keywords
def blend_answers(
    models: Models,
    prompts: str | Path,
    out: str | Path,
    *,
    ranker: str | Path | None = None,
    rank_command: str | None = None,
    fuser: Reference | None = None,
    top: int = 3,
    each: int = 1,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    device: str = "auto",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Blended:
    """Let several models answer, rank the answers, and have another one written from the best.

    Models are loaded one after another. What each of them said is kept beside `out`, so that an interrupted run continues, and
    one with another ranker or fuser does not ask the models again.

    Args:
        models: Checkpoints or recipes of merges, as for `evaluate`.
        prompts: A file of prompts, as for `read_prompts`.
        out: The file to write, a line per prompt; it must not exist.
        ranker: A reward model of transformers; None to rank by a command, or not at all.
        rank_command: A command that scores answers: see `CommandRanker`.
        fuser: The model that writes from the best answers; None for none.
        top: Number of answers that it is shown.
        each: Answers of each model to each prompt.
        max_tokens: Most tokens of an answer.
        temperature: Of the draws; 0 takes the likeliest token.
        top_p: Probability of the tokens that are drawn from.
        seed: Seed of the draws.
        batch_tokens: Most tokens of prompts, with padding, and answers that a model has before it at once.
        device: Where models run: auto, cpu or cuda.
        cache_dir: Folder for models from the Hub.
        progress: Called with what is done.

    Raises:
        DataError: The prompts, or the settings, are not valid, or the command fails.
        TaskError: Two models have one name, or none is given.
        MergeError: A model cannot be opened.
        OutputError: `out` exists or cannot be written.
    """
    out = Path(out)
    sampling = Sampling(each, max_tokens, temperature, top_p, seed)
    for name, value in (("top", top), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise DataError(f"{name}: must be at least 1, got {value}")
    if ranker is not None and rank_command is not None:
        raise DataError("ranker: a model and a command are given; give one of them")
    where = resolve_devices(device)[0]
    _check_out(out)
    read = read_prompts(prompts)
    with ExitStack() as stack:
        tokenizers: dict[str, Tokenizer] = {}

        def opened(reference: Reference) -> LanguageModel:
            found = open_model(open_source(reference, stack, cache_dir=cache_dir), tokenizers)
            check_speaker(found)
            return found

        speakers = {own.name: opened(own.reference) for own in make_roster(models, None, (), ()).entries}
        ranks: Ranker | None = None
        if rank_command is not None:
            ranks = CommandRanker(rank_command)
        elif ranker is not None:
            ranks = open_reward_model(ranker, where, cache_dir=cache_dir)
        writer = None if fuser is None else Fuser(opened(fuser), top)
        journal = stack.enter_context(Journal(journal_path(out)))
        run = _Run(read, sampling, batch_tokens, where, journal, progress or (lambda what, done, count: None))
        lines = run.lines(speakers, ranks, writer)
    with failures_of(out):
        text = "".join(json.dumps(own.to_json(), ensure_ascii=False) + "\n" for own in lines)
        write_whole(out, text, temporary=out.with_name(f".{out.name}.new"))
    return summarise(out, journal_path(out), [*speakers], lines, fuser=writer is not None)


def _check_out(out: Path) -> None:
    """Check that the file can be written, before anything runs."""
    try:
        if os.path.lexists(out):
            raise OutputError(f"{out}: exists; choose another name, or remove it")
        if not out.parent.is_dir():
            raise OutputError(f"{out}: there is no folder {out.parent}; make it first")
    except ValueError as error:
        raise OutputError(f"{str(out)!r}: is not the name of a file: {error}") from None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out}: cannot be written: {os_reason(error)}") from None


@dataclass(frozen=True)
class _Run:
    """A run: prompts, settings, and what is known already."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    batch_tokens: int
    device: torch.device
    journal: Journal
    progress: Progress

    def lines(self, speakers: Mapping[str, LanguageModel], ranker: Ranker | None, fuser: Fuser | None) -> list[Line]:
        """Return everything that is said of each prompt."""
        # before the first model is loaded: a prompt that does not fit one of them
        tokens = {name: self._tokens(name, opened) for name, opened in speakers.items()}
        said = {name: self._said(name, opened, tokens[name]) for name, opened in speakers.items()}
        answers = [[(name, own) for name in said for own in said[name][row]] for row in range(len(self.prompts))]
        lines = [
            Line(prompt, [Scored(name, own, None) for name, own in each])
            for prompt, each in zip(self.prompts, answers, strict=True)
        ]
        if ranker is not None:
            scores = self._scores(ranker, [[own.text for _, own in each] for each in answers])
            for line, own in zip(lines, scores, strict=True):
                line.rank(own)
        if fuser is not None:
            self._fuse(fuser, lines)
            fused = [line for line in lines if line.fused is not None]
            if ranker is not None and fused:
                texts = [[line.fused.text] for line in fused if line.fused is not None]
                rated = self._scores(ranker, texts, [line.prompt for line in fused])
                for line, (score,) in zip(fused, rated, strict=True):
                    line.fused_score = score
        return lines

    def _tokens(self, name: str, opened: LanguageModel) -> list[list[int]]:
        found = [tokens_of(opened.tokenizer, prompt, name) for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, found, strict=True):
            if opened.positions is not None and len(ids) >= opened.positions:
                raise DataError(
                    f"{prompt.where}: has {len(ids):,} tokens for {name}, which can see {opened.positions:,} at once; "
                    "nothing is left for an answer; shorten it"
                )
            if not ids:
                raise DataError(f"{prompt.where}: has no tokens for {name}")
        return found

    def _said(self, name: str, opened: LanguageModel, tokens: Sequence[Sequence[int]]) -> list[list[Answer]]:
        """Return the answers of a model, which is loaded if any is not known."""
        tasks = [Task(prompt.number, ids) for prompt, ids in zip(self.prompts, tokens, strict=True)]
        return self._generated(f"{name} answers", opened, tasks, self.sampling)

    def _generated(
        self, what: str, opened: LanguageModel, tasks: Sequence[Task], sampling: Sampling
    ) -> list[list[Answer]]:
        key = hash_of(__version__, opened.source.hash, json.dumps(sampling.to_json()))
        known = [self.journal.get(key, task.number) is not None for task in tasks]
        if not all(known):
            self.progress(what, sum(known), len(tasks))
            speaker = Speaker(opened, self.device)
            # those that are known are in the batches, too, so that these are always the same
            for batch in grouped(tasks, sampling, opened.positions, self.batch_tokens):
                if not all(known[row] for row in batch):
                    self._answer(key, speaker, [tasks[row] for row in batch], sampling)
                    for row in batch:
                        known[row] = True
                    self.progress(what, sum(known), len(tasks))
            del speaker
            release_freed_memory()
        kept = (self.journal.get(key, task.number) or {} for task in tasks)
        return [[Answer(own["text"], own["ended"]) for own in each["answers"]] for each in kept]

    def _answer(self, key: str, speaker: Speaker, tasks: Sequence[Task], sampling: Sampling) -> None:
        """Have a batch answered, and keep what was not known."""
        for task, found in zip(tasks, speaker.answers(tasks, sampling), strict=True):
            if self.journal.get(key, task.number) is None:
                content = {"answers": [{"text": own.text, "ended": own.ended} for own in found]}
                self.journal.add(key, task.number, content, model=speaker.name)

    def _scores(
        self, ranker: Ranker, answers: Sequence[Sequence[str]], prompts: Sequence[Prompt] | None = None
    ) -> list[list[float]]:
        """Return the scores of some answers to each prompt; those of a model are kept."""
        prompts = self.prompts if prompts is None else prompts
        count = len(prompts)

        def advance(done: int) -> None:
            self.progress(f"{ranker.name} scores", done, count)

        if ranker.hash is None:
            return ranker.scores(prompts, answers, advance)
        key = hash_of(__version__, "scores", ranker.hash)
        numbers = [number_of(prompt.number, own) for prompt, own in zip(prompts, answers, strict=True)]
        missing = [row for row in range(count) if self.journal.get(key, numbers[row]) is None]
        if missing:
            found = ranker.scores([prompts[row] for row in missing], [answers[row] for row in missing], advance)
            for row, own in zip(missing, found, strict=True):
                self.journal.add(key, numbers[row], {"scores": own}, model=ranker.name)
            release_freed_memory()
        return [list((self.journal.get(key, number) or {})["scores"]) for number in numbers]

    def _fuse(self, fuser: Fuser, lines: Sequence[Line]) -> None:
        """Have the fuser write an answer to each prompt for which the best one fits into what it can see."""
        tasks = [fuser.task(line.prompt, [line.answers[i].answer.text for i in line.order()]) for line in lines]
        given = [(line, task) for line, task in zip(lines, tasks, strict=True) if task is not None]
        sampling = Sampling(
            1, self.sampling.max_tokens, self.sampling.temperature, self.sampling.top_p, self.sampling.seed
        )
        found = self._generated("fusing", fuser.opened, [task for _, task in given], sampling)
        for (line, task), (own,) in zip(given, found, strict=True):
            line.fused, line.shown = own, line.order()[: task.shown]
