"""Ask and tell over Optuna: which point is tried next, and its score.

The journal of the study is a file of Optuna's, which its dashboard opens, too. A new sampler is made for every trial,
with a seed of the study's seed and the trial's number, so that a study that was killed and continued asks for the same
points as one that was not. Processes that share a study ask one after another; a trial holds the name of the process
that works on it, and one whose process is dead is taken over.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError, UnsupportedError
from .many.claims import Claims
from .many.storage import open_storage, shown, storage_errors
from .samplers import OWN, is_nestable, wrap
from .scoring.objectives import Direction
from .space.dimension import Dimension

SAMPLERS = ("auto", "cma", "tpe", "gp", "random", "nsga2", "nsga3", *OWN)

NAME = "merganser"
"""Name of a study in its own journal."""

_OWNER = "process"
_LEAST = 8
"""Trials from which on it is said what matters."""
_FEW = 30
"""Trials up to which a Gaussian process is the default, and its time per trial is small."""
_NARROW = 12
"""Dimensions up to which it is."""


@dataclass(frozen=True, slots=True)
class Told:
    """A trial that is over.

    Args:
        number: Its number, from 0.
        point: Value of each dimension.
        values: The objectives; None if it failed.
        about: What was stored with it.
        feasible: Whether it keeps all bounds.
    """

    number: int
    point: Mapping[str, float | int]
    values: tuple[float, ...] | None
    about: Mapping[str, Any]
    feasible: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A trial to carry out."""

    number: int
    point: Mapping[str, float | int]
    handle: Any


class Study:
    """A study of Optuna, in a journal file, at an address, or in memory.

    Args:
        where: The journal, or an address for `open_storage`; None for memory only.
        dimensions: The search space.
        directions: Direction of each objective.
        sampler: One of `SAMPLERS` but auto, from `choose_sampler`.
        seed: Seed of the sampler.
        start: Point of the first trial.
        name: Name of the study.
        claims: Who works on it; None if no other process does.

    Raises:
        UnsupportedError: Optuna is not installed, or the address is malformed.
        OutputError: The storage cannot be reached, or is damaged.
    """

    def __init__(
        self,
        where: Path | str | None,
        dimensions: Sequence[Dimension],
        directions: Sequence[Direction],
        sampler: str,
        seed: int,
        start: Mapping[str, float | int],
        *,
        name: str = NAME,
        claims: Claims | None = None,
    ) -> None:
        optuna = _optuna()
        self._optuna, self._sampler, self._seed, self._start = optuna, sampler, seed, start
        self._dimensions = tuple(dimensions)
        self._spaces = {dimension.name: _distribution(dimension) for dimension in dimensions}
        self._where, self._claims = where, claims
        try:
            with self._guarded():
                storage = optuna.storages.InMemoryStorage() if where is None else open_storage(where)
                self._study = optuna.create_study(
                    storage=storage, study_name=name, directions=list(directions), load_if_exists=True
                )
        except (ValueError, KeyError, optuna.exceptions.OptunaError) as error:
            raise OutputError(f"{where}: the journal of the study cannot be read: {error}") from None

    def ask(self, most: int | None = None, recipe: Callable[[Mapping[str, Any]], str] = str) -> Asked | None:
        """Return a trial to carry out: one that was left unfinished, else a new one.

        Args:
            most: Number of trials in all; None for no limit.
            recipe: Returns the recipe of a point. No two processes get trials of one recipe at a time.

        Returns:
            The trial; None if those that are missing are under way in other processes.
        """
        states = self._optuna.trial.TrialState
        with self._claims.turn("ask") if self._claims else contextlib.nullcontext(), self._guarded():
            trials = [t for t in self._study.get_trials(deepcopy=False) if t.state != states.WAITING]
            running = [trial for trial in trials if trial.state == states.RUNNING]
            taken = {trial.number for trial in running if self._is_taken(trial)}
            busy = {recipe(dict(trial.params)) for trial in running if trial.number in taken}
            for trial in running:
                if trial.number not in taken:
                    found = self._asked(trial.number, trial)
                    if not busy or recipe(found.point) not in busy:
                        return self._owned(found)
            if len(taken) < len(running) or (most is not None and len(trials) >= most):
                return None
            if not trials:
                self._study.enqueue_trial(dict(self._start), skip_if_exists=True)
            found = self._asked(len(trials), None)
            return None if busy and recipe(found.point) in busy else self._owned(found)

    def _asked(self, number: int, left: Any) -> Asked:
        """Return trial `number`: a new one, or one that another process left unfinished."""
        self._study.sampler = self._new_sampler(number)
        trial = self._study.ask() if left is None else self._optuna.trial.Trial(self._study, left._trial_id)
        known = {} if left is None else dict(left.params)
        point: dict[str, float | int] = {}
        for dimension in self._dimensions:
            if not dimension.is_open(point):
                continue
            name, space = dimension.name, self._spaces[dimension.name]
            if name in known and name not in trial.relative_params:
                # its process was killed between two values: the next one is drawn after this one, as it would have been
                self._study.sampler.sample_independent(self._study, left, name, space)
            point[name] = _suggest(trial, name, space)
        return Asked(trial.number, point, trial)

    def _owned(self, asked: Asked) -> Asked:
        if self._claims is not None:
            asked.handle.set_user_attr(_OWNER, self._claims.name)
        return asked

    def _is_taken(self, trial: Any) -> bool:
        owner = trial.user_attrs.get(_OWNER)
        return (
            self._claims is not None and owner is not None and owner != self._claims.name and self._claims.lives(owner)
        )

    @property
    def busy(self) -> bool:
        """Whether another process works on a trial."""
        with self._guarded():
            running = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,))
        return any(self._is_taken(trial) for trial in running)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Hide warnings about features of Optuna that it may still change, and tell what the storage refuses."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except storage_errors() as error:
                if isinstance(error, OutputError | UnsupportedError):
                    raise
                reason = str(error).strip().partition("\n")[0]
                raise OutputError(f"storage {shown(str(self._where))}: {reason}; the same command continues") from None

    def tell(
        self, asked: Asked, values: Sequence[float] | None, about: Mapping[str, Any], excess: Mapping[str, float]
    ) -> None:
        """Store the score of a trial.

        Args:
            asked: The trial.
            values: The objectives; None if it failed.
            about: More to store with it, as plain data.
            excess: By how much it misses each bound; 0 or less if it keeps it.
        """
        # a process that slept for long finds its trial finished by another one, with the same figures
        finished = self._optuna.exceptions.UpdateFinishedTrialError
        with self._guarded(), contextlib.suppress(finished):
            for name, value in about.items():
                asked.handle.set_user_attr(name, value)
            for name, by in excess.items():
                asked.handle.set_constraint(name, by)
            state = self._optuna.trial.TrialState
            if values is None:
                self._study.tell(asked.handle, state=state.FAIL, skip_if_finished=True)
            else:
                self._study.tell(asked.handle, list(values), skip_if_finished=True)

    @property
    def keeps_scores(self) -> bool:
        """Whether the sampler needs the score of each item, which is then told as `SCORES`."""
        return self._sampler == "m2n2"

    @property
    def told(self) -> list[Told]:
        """The trials that are over, in order."""
        states = self._optuna.trial.TrialState
        with self._guarded():
            over = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))
        return [
            Told(
                trial.number,
                dict(trial.params),
                tuple(trial.values) if trial.state == states.COMPLETE else None,
                dict(trial.user_attrs),
                all(by <= 0 for by in trial.constraints.values()),
            )
            for trial in over
        ]

    def importance(self, objective: int) -> dict[str, float]:
        """Return which share of the variation of an objective each dimension explains; nothing where too few trials tell.

        By PED-ANOVA (Watanabe et al., IJCAI 2023), over the trials that have figures, those that were ended early included.
        """
        states = self._optuna.trial.TrialState
        with self._guarded():
            over = self._study.get_trials(deepcopy=False, states=(states.COMPLETE,))
            if len(over) < _LEAST or len({trial.values[objective] for trial in over}) < 2:
                return {}
            found = self._optuna.importance.get_param_importances(
                self._study, target=lambda trial: trial.values[objective]
            )
        return {name: float(share) for name, share in found.items() if math.isfinite(share)}

    def _new_sampler(self, number: int) -> Any:
        samplers = self._optuna.samplers
        seed = (self._seed * 1_000_003 + number) % 2**31
        if self._sampler == "cma":
            # the first step is a sixth of each range. Without adapting the learning rate, which is for noise: all trials are
            # scored on the same items, and in 60 trials the adaptation costs most of what CMA-ES gains (docs/search.md)
            return samplers.CmaEsSampler(x0=dict(self._start), seed=seed, warn_independent_sampling=False)
        if self._sampler == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=8)
        if self._sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=20)
        if self._sampler == "nsga3":
            return samplers.NSGAIIISampler(seed=seed, population_size=20)
        if self._sampler in OWN:
            return wrap(self._optuna, OWN[self._sampler], self._dimensions, self._spaces, self._seed)
        if self._sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed)


def choose_sampler(
    wanted: str, dimensions: Sequence[Dimension], objectives: int, bounds: int, trials: int | None
) -> str:
    """Return the sampler to use.

    Args:
        wanted: One of `SAMPLERS`.
        dimensions: The search space.
        objectives: Number of objectives.
        bounds: Number of bounds.
        trials: Number of trials; None if only time limits them.

    Raises:
        UnsupportedError: The sampler is not known, or cannot search this space.
    """
    if wanted not in SAMPLERS:
        raise UnsupportedError(f"sampler: {wanted!r} is not known; known: {', '.join(SAMPLERS)}")
    numbers = all(dimension.choices is None for dimension in dimensions)
    if wanted == "cma":
        if not numbers:
            raise UnsupportedError("sampler: cma searches numbers, and this recipe has choices; take tpe")
        if objectives > 1 or bounds:
            raise UnsupportedError("sampler: cma takes one objective without bounds; take tpe, or nsga2")
        if len(dimensions) < 2:
            raise UnsupportedError("sampler: cma needs at least two free values; take tpe, or gp")
    if wanted in ("greedy", "particles", "genome", "nested") and objectives > 1:
        raise UnsupportedError(f"sampler: {wanted} takes one objective; take tpe, quadratic, nsga2 or nsga3")
    if wanted in ("particles", "quadratic", "bayesian") and not numbers:
        raise UnsupportedError(f"sampler: {wanted} searches numbers, and this recipe has choices; take tpe, or greedy")
    if wanted == "bayesian" and not 2 <= len(dimensions) <= 6:
        raise UnsupportedError(
            f"sampler: bayesian takes two to six free values, and this recipe has {len(dimensions)}; take quadratic, or gp"
        )
    if wanted == "nested" and not is_nestable(dimensions):
        raise UnsupportedError(
            "sampler: nested merges two models at a time, so the free values must be one weight for each model, from 0 or "
            "below, and nothing else: weight: {search: [0, 1], per: model}; take quadratic, or tpe"
        )
    if wanted != "auto":
        return wanted
    if objectives > 1 or bounds or not numbers:
        return "tpe"
    if trials is not None and trials <= _FEW and len(dimensions) <= _NARROW:
        return "gp"
    return "cma" if len(dimensions) > 1 else "tpe"


def _optuna() -> Any:
    try:
        import cmaes  # noqa: F401
        import optuna
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"a search needs {error.name}, which is not installed: pip install 'merganser[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices is not None:
        return CategoricalDistribution(tuple(range(len(dimension.choices))))
    if dimension.integer:
        step = int(dimension.step or 1)
        high = dimension.low + step * ((dimension.high - dimension.low) // step)
        return IntDistribution(int(dimension.low), int(high), log=dimension.log, step=step)
    if dimension.step is None:
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    steps = int((dimension.high - dimension.low) / dimension.step + 1e-9)
    return FloatDistribution(dimension.low, dimension.low + steps * dimension.step, step=dimension.step)


def _suggest(trial: Any, name: str, space: Any) -> Any:
    if hasattr(space, "choices"):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space.low, int):
        return trial.suggest_int(name, space.low, space.high, log=space.log, step=space.step)
    return trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)
