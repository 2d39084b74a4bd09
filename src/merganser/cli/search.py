"""`merganser search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..wording import plural
from . import _options as options
from .eval import Base, Context, DType, Experts, LmEval, Stride
from .printing.text import complain, say_json

if TYPE_CHECKING:
    from ..search import Found

Recipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe with open values: {search: [low, high]}, {search: auto} or {choices: [...]}.",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder of the search; an existing one is continued.", show_default=False)
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK...",
        help="Texts (.txt), questions or documents (.jsonl), tasks of lm-eval (.yaml or a name); NAME=TASK names one. Half of "
        "each is held out.",
        show_default=False,
    ),
]
Command = Annotated[
    str | None,
    typer.Option(
        metavar="CMD",
        help="Instead of tasks: a command that gets the folder of a merge for {model} and prints JSON.",
        show_default=False,
    ),
]
Timeout = Annotated[float, typer.Option(metavar="S", help="Seconds after which the command is killed.")]
Objectives = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME...",
        help="What to improve: TASK/METRIC, recovered/mean, recovered/worst, forgotten/mean, 0.5*NAME+NAME; of a "
        "command NAME:maximize or NAME:minimize. Several give a Pareto front.  [default: recovered/mean, else the mean]",
        show_default=False,
    ),
]
AtLeast = Annotated[
    list[str] | None, typer.Option(metavar="NAME=X...", help="Lower bound that the winner meets.", show_default=False)
]
AtMost = Annotated[
    list[str] | None, typer.Option(metavar="NAME=X...", help="Upper bound that the winner meets.", show_default=False)
]
NumberOfTrials = Annotated[
    int | None,
    typer.Option("--trials", min=1, metavar="N", help="Trials in all.  [default: 50, or no limit with --hours]"),
]
Hours = Annotated[
    float | None,
    typer.Option(
        metavar="H",
        help="Hours after which no trial begins; counted again from the start when a search is continued.",
        show_default=False,
    ),
]
Sampler = Annotated[
    str,
    typer.Option(
        metavar="auto|cma|tpe|gp|random|nsga2|nsga3|greedy|particles|quadratic|m2n2|genome|nested|bayesian",
        help="Algorithm that chooses the next values.",
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, metavar="N", help="Seed of the sampler, and of the division of tasks into halves.")
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Items of each task, both halves.  [default: all]", show_default=False),
]
Early = Annotated[
    bool,
    typer.Option("--early-stopping/--no-early-stopping", help="End a trial that is significantly worse than the best."),
]

Estimator = Annotated[
    str | None,
    typer.Option(
        metavar="control_variate|p_irt|gp_irt|mp_irt|gmp_irt",
        help="End a trial after the first items if its estimated figure is not above the best; *_irt are of questions.",
        show_default=False,
    ),
]
ItemParameters = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Parameters of the items, for --estimator.  [default: fitted to the answers of the search]",
        show_default=False,
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Where trials are stored: the path of a journal, sqlite:///FILE, postgresql://...  [default: OUT/trials.log]",
        show_default=False,
    ),
]
ClusterAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Spread the trials over a Ray cluster: auto, HOST:PORT, ray://HOST:PORT or local.",
        show_default=False,
    ),
]


def search(
    recipe: Recipe,
    out: Out,
    tasks: Tasks = None,
    command: Command = None,
    timeout: Timeout = 3600.0,
    objective: Objectives = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    base: Base = None,
    experts: Experts = None,
    trials: NumberOfTrials = None,
    hours: Hours = None,
    sampler: Sampler = "auto",
    seed: Seed = 0,
    limit: Limit = None,
    context: Context = None,
    stride: Stride = None,
    dtype: DType = None,
    device: options.Device = "cpu",
    batch_tokens: options.BatchTokens = 4096,
    lm_eval: LmEval = None,
    early_stopping: Early = True,
    estimator: Estimator = None,
    item_parameters: ItemParameters = None,
    storage: Storage = None,
    cluster: ClusterAddress = None,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find open values of a recipe by trials.

    Half of the items of each task are used to choose, the other half to test what was chosen. The same command continues a
    search that was stopped or killed, and joins one that runs.
    """
    options.quieten_hub(quiet)
    options.check_recipe_file(recipe)
    from ..search import Interrupted
    from ..search import search as run
    from .printing.found import SearchProgress, print_found, write_page

    progress = SearchProgress(quiet=quiet or json)
    try:
        found = run(
            recipe,
            out,
            tasks or (),
            command=command,
            timeout=timeout,
            objectives=objective or (),
            at_least=at_least or (),
            at_most=at_most or (),
            base=base,
            experts=experts or (),
            trials=trials,
            hours=hours,
            sampler=sampler,
            seed=seed,
            limit=limit,
            context=context,
            stride=stride,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            lm_eval=lm_eval or (),
            early_stopping=early_stopping,
            estimator=estimator,
            item_parameters=item_parameters,
            storage=storage,
            cluster=cluster,
            cache_dir=cache_dir,
            progress=progress,
        )
    except Interrupted as stopped:
        _say_best(stopped.found)
        write_page(stopped.found.folder, quiet=True)
        raise
    if json:
        say_json(found.to_json())
    elif not quiet:
        print_found(found)
    write_page(found.folder, quiet=quiet or json)
    if found.best is None:
        complain("error", _without_winner(found))
        raise typer.Exit(2)


def _say_best(found: Found) -> None:
    best = found.best
    if best is None or best.values is None:
        complain("note", f"{plural(len(found.trials), 'trial')} done, none that may win")
        return
    figures = ", ".join(f"{o.text} {value:.4f}" for o, value in zip(found.objectives, best.values, strict=True))
    complain(
        "note",
        f"{plural(len(found.trials), 'trial')} done; the best so far is trial {best.number + 1}: {figures}; "
        f"{found.recipe_file(best)}. The same command continues",
    )


def _without_winner(found: Found) -> str:
    failed = [trial for trial in found.trials if trial.failed]
    if len(failed) == len(found.trials):
        return (
            f"all {plural(len(failed), 'trial')} failed; the last: {failed[-1].failed if failed else 'none was made'}"
        )
    return f"none of {plural(len(found.trials), 'trial')} keeps all bounds; {found.folder / 'result.json'} has their figures"
