"""Search the free values of a recipe."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.kernels.devices import resolve_devices
from ..evaluation.run import BATCH_TOKENS, Wanted
from ..evaluation.scoring.harness_arguments import parse_arguments
from ..inference.sources import Reference
from ..recipe import Recipe
from ..recipe.load import RecipeSource
from .ends import average_of, measure_ends
from .folder import Folder, key_of, open_folder
from .found import Found, write_found
from .many.cluster import connect, spread
from .scoring.bench import Model
from .setup import Prepared, Request, prepare
from .trials import Progress, Silent

TRIALS = 50
TIMEOUT = 3600.0
_FRONT_SHOWN = 8


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed; the same call continues the search.

    Args:
        found: What was found so far, without ends.
    """

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found


def search(
    recipe: RecipeSource,
    out: str | Path,
    tasks: Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    command: str | None = None,
    timeout: float = TIMEOUT,
    objectives: Sequence[str] = (),
    at_least: Sequence[str] = (),
    at_most: Sequence[str] = (),
    base: Reference | None = None,
    experts: Mapping[str, Reference] | Sequence[str] = (),
    trials: int | None = None,
    hours: float | None = None,
    sampler: str = "auto",
    seed: int = 0,
    limit: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    lm_eval: Mapping[str, Any] | Sequence[str] = (),
    early_stopping: bool = True,
    estimator: str | None = None,
    item_parameters: str | Path | None = None,
    storage: str | Path | None = None,
    cluster: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Find the free values of a recipe by trying them, and test the best on items that no trial saw.

    Args:
        recipe: The recipe, with values such as `{search: [0, 1]}`: a path, a YAML text, a mapping.
        out: Folder of the search; the same call continues one that was stopped.
        tasks: Texts, questions or documents, and tasks of lm-eval, as for `evaluate`; half of the items of each are held
            out.
        command: An external command instead of tasks; it gets the folder of a merge for `{model}`, and prints a JSON
            object of numbers.
        timeout: Seconds after which the command is ended.
        objectives: What to improve: `TASK/METRIC`, `recovered/mean`, `recovered/worst`, `forgotten/mean`, a weighted
            sum, or NAME:maximize of a command. By default `recovered/mean` with experts, else the mean of the tasks' main
            metric. Several give a front.
        at_least: Bounds, `NAME=NUMBER`.
        at_most: Bounds.
        base: The base, for what a merge recovers and forgets.
        experts: The model trained for a task, as for `evaluate`.
        trials: Number of trials, those of earlier calls included; by default 50, with `hours` as many as they allow.
        hours: Time after which no trial begins, from the beginning of this call: a search that is continued has it again.
        sampler: auto, cma, tpe, gp, random, nsga2, nsga3, greedy, particles, quadratic, m2n2, genome,
            nested or bayesian.
        seed: Seed of the sampler and of the division of the items.
        limit: Number of items of each task, both halves together.
        context: As for `evaluate`.
        stride: As for `evaluate`.
        dtype: As for `evaluate`.
        device: As for `evaluate`.
        batch_tokens: As for `evaluate`.
        lm_eval: As for `evaluate`.
        early_stopping: Whether a trial ends once it is worse than the best one beyond chance; only with one objective.
        estimator: control_variate, p_irt, gp_irt, mp_irt or gmp_irt: a trial that is not better than the best one by this estimate ends after
            the first wave of items; None for a test of the difference.
        item_parameters: File with the parameters of the items; by default they are fitted to the answers of this search.
        storage: Where trials are stored, for `open_storage`: the path of a journal, or an address; by default a journal in `out`.
            `out` is needed all the same, and all processes of a search have the same one.
        cluster: Address of a Ray cluster, whose nodes share `out` and the models; they carry out the trials.
        cache_dir: Folder for models from the Hub.
        progress: Receives the progress.

    Raises:
        MergeError: The recipe, a task, an option or the folder is wrong; the message says why.
        Interrupted: Ctrl-C was pressed.
    """
    progress = progress or Silent()
    request = Request(
        recipe=recipe,
        tasks=tasks,
        command=command,
        timeout=timeout,
        objectives=objectives,
        at_least=at_least,
        at_most=at_most,
        base=base,
        experts=experts,
        trials=TRIALS if trials is None and hours is None else trials,
        hours=hours,
        sampler=sampler,
        seed=seed,
        wanted=Wanted(
            limit=limit,
            context=context,
            stride=stride,
            dtype=dtype,
            batch_tokens=batch_tokens,
            device=resolve_devices(device)[0],
            harness=parse_arguments(lm_eval),
        ),
        early_stopping=early_stopping,
        estimator=estimator,
        item_parameters=None if item_parameters is None else Path(item_parameters),
        storage=None if storage is None else str(storage),
        cache_dir=cache_dir,
    )
    request, notes = request.completed()
    space, start = request.check()
    for note in notes:
        progress.note(note)
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    with connect(cluster) as connected, open_folder(Path(out), shared=True) as folder:
        prepared = prepare(request, space, start, folder, progress)
        try:
            if connected is not None:
                spread(connected, request, folder, prepared.trials, deadline, progress)
            prepared.trials.run(request.trials, deadline, progress)
            return _tested(prepared, folder, progress)
        except KeyboardInterrupt:
            prepared.trials.refresh()
            raise Interrupted(_found(prepared, folder)) from None


def _tested(prepared: Prepared, folder: Folder, progress: Progress) -> Found:
    """Measure winner, inputs and average on what no trial saw; of several processes, the first one does."""
    with folder.claims.turn("test", lambda: progress.note("another process measures what was found; waiting for it")):
        prepared.trials.refresh()
        found = _found(prepared, folder)
        if not found.front:
            return found
        contenders = [(prepared.trials.written(trial), "winner") for trial in found.front[:_FRONT_SHOWN]]
        contenders += [(model, "input") for model in prepared.setup.inputs] + _average(prepared.start, folder)
        ends = measure_ends(contenders, prepared.setup.judge, progress)
        missed = [note for model, role in contenders if role == "winner" for note in prepared.setup.missed(model)]
        for note in missed:
            progress.note(note)
        notes = [*prepared.setup.notes, *missed]
        return write_found(prepared.trials, ends, prepared.setup.held_out, notes, folder, prepared.sampler)


def _found(prepared: Prepared, folder: Folder) -> Found:
    """Return what is known so far, and write it."""
    return write_found(prepared.trials, [], prepared.setup.held_out, prepared.setup.notes, folder, prepared.sampler)


def _average(start: Sequence[Recipe], folder: Folder) -> list[tuple[Model, str]]:
    text = average_of(start)
    if text is None:
        return []
    return [(Model(key_of(text), "average", folder.write_recipe("average", text)), "average")]
