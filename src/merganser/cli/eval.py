"""`merganser eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..wording import measured_text, plural, size_text, time_text
from . import _options as options
from .printing.progress import EvalProgress
from .printing.text import complain, head, say, say_json, table

if TYPE_CHECKING:
    from ..evaluation import Estimate, Evaluation, Retention

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT",
        help="Checkpoints, MODEL+ADAPTER, OUT#TASK of sidecars (OUT#auto: chosen by its router), or recipes (merged in "
        "memory); NAME=CKPT names one.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str],
    typer.Option(
        metavar="TASK...",
        help="Texts (.txt), questions or documents (.jsonl), tasks of lm-eval (.yaml or a name); NAME=TASK names one.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None, typer.Option(metavar="CKPT", help="The common ancestor of the models.", show_default=False)
]
Experts = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK=CKPT...", help="The model trained for a task; needs --base.", show_default=False),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Items of each task: windows, documents, questions.  [default: all]",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tokens of a text in one window.  [default: 512]", show_default=False),
]
Stride = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tokens of a text that each further window scores.  [default: half of --context]",
        show_default=False,
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16|float16",
        help="Dtype to compute in.  [default: float32; for texts float32 or bfloat16, whichever is faster here]",
        show_default=False,
    ),
]
LmEval = Annotated[
    list[str] | None,
    typer.Option(
        "--lm-eval",
        metavar="NAME=VALUE...",
        help="Arguments of lm-eval: num_fewshot=5, apply_chat_template=true, max_length=2048, ...",
        show_default=False,
    ),
]
JsonFile = Annotated[
    str | None,
    typer.Option(
        metavar="OUT",
        help="Write the result here, and beside it the measurements so far, so that the same command continues; - prints it.",
        show_default=False,
    ),
]


def evaluate(
    models: Models,
    tasks: Tasks,
    base: Base = None,
    experts: Experts = None,
    limit: Limit = None,
    context: Context = None,
    stride: Stride = None,
    dtype: DType = None,
    device: options.Device = "cpu",
    batch_tokens: options.BatchTokens = 4096,
    lm_eval: LmEval = None,
    json: JsonFile = None,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure models on tasks, and what merges kept of experts.

    The checkpoints come first: --tasks and --experts take all that follows, up to the next option.
    """
    options.quieten_hub(quiet)
    from ..evaluation import evaluate as measure

    with EvalProgress(quiet) as progress:
        found = measure(
            models,
            tasks,
            base=base,
            experts=experts or (),
            limit=limit,
            context=context,
            stride=stride,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            lm_eval=lm_eval or (),
            json=None if json == "-" else json,
            cache_dir=cache_dir,
            progress=progress,
        )
    if json == "-":
        say_json(found.to_json())
    elif not quiet:
        _print(found, json)
    for failure in found.failures:
        complain("error", failure)
    if found.failures:
        raise typer.Exit(2)


def _print(found: Evaluation, out: str | None) -> None:
    for warning in found.warnings:
        complain("warning", warning)
    settings = found.settings
    head(
        f"{plural(len(found.models), 'model')} · {plural(len(found.tasks), 'task')} · {settings['dtype']} "
        f"({settings['dtype_reason']}) · {time_text(found.seconds)} · peak {size_text(found.peak_memory)}"
    )
    rank = 0
    while _figures(found, rank):
        rank += 1
    for model, own in found.outcomes.items():
        told = found.models[model].reference.endswith("#told")
        if not told and any(outcome.chosen for outcome in own.values()):
            _choices(found, model)
    if found.retention is not None:
        _retention(found, found.retention)
    if out is not None:
        say(f"wrote {out}, and {found.items_file} with the measurements of every item")


def _figures(found: Evaluation, rank: int) -> bool:
    """Print the metric at `rank` of every task (0 is the main one); return whether any task has it."""
    shown = {name: task.metrics[rank] for name, task in found.tasks.items() if rank < len(task.metrics)}
    if not shown:
        return False
    higher = {
        (task, metric): outcome.higher_is_better.get(metric, True)
        for own in found.outcomes.values()
        for task, outcome in own.items()
        for metric in outcome.metrics
    }
    say("results (↑ higher is better, ↓ lower is better; ± standard error)" if rank == 0 else "other metrics")
    arrows = {task: "↑" if higher.get((task, metric), True) else "↓" for task, metric in shown.items()}
    rows = [["model", *shown], ["", *(f"{metric} {arrows[task]}" for task, metric in shown.items())]]
    for model in found.outcomes:
        cells = [_figure(found.metric(model, task, metric)) for task, metric in shown.items()]
        rows.append([model, *cells])
    if rank == 0:
        rows.append(["items", *(f"{plural(found.tasks[task].items, found.tasks[task].unit)}" for task in shown)])
    for line in table(rows):
        say(line)
    return True


def _choices(found: Evaluation, model: str) -> None:
    """Print which tasks a routed model chose."""
    chosen = {task: outcome.chosen for task, outcome in found.outcomes[model].items() if outcome.chosen}
    names = sorted({name for counts in chosen.values() for name in counts})
    rows = [["text of", "right", *(f"-> {name}" for name in names)]]
    for task, counts in chosen.items():
        right = found.right(model, task)
        rows.append(
            [task, "-" if right is None else f"{100 * right:.1f} %", *(str(counts.get(name, 0)) for name in names)]
        )
    gated = found.models[model].reference.endswith("#gates")
    what = "that has the largest share of them" if gated else "that was chosen for them"
    say(f"choices of {model}: windows or questions by the task {what}")
    for line in table(rows):
        say(line)


def _figure(estimate: Estimate | None) -> str:
    if estimate is None:
        return "failed"
    return measured_text(estimate.value, estimate.stderr)


def _retention(found: Evaluation, kept: Retention) -> None:
    scales = kept.to_json()["models"]
    say("recovered: share of the expert's gain over the base; forgotten: loss as a share of the base's figure")
    rows = [
        [
            "model",
            *kept.domains,
            "mean",
            "worst",
            *(f"forgotten {task}" for task in kept.retained),
            "against best single",
        ]
    ]
    for model, own in scales.items():
        worst = own["worst"]
        rows.append(
            [
                model,
                *(_share(own["recovered"][domain]) for domain in kept.domains),
                _share(own["mean"]),
                _share(worst) + (f" {worst['domain']}" if worst else ""),
                *(_relative(own["forgotten"].get(task)) for task in kept.retained),
                _share(own["against_best_single"], sign="+"),
            ]
        )
    for line in table(rows):
        say(line)
    if kept.best_single is not None:
        say(f"  best single model: {kept.best_single[0]}, mean recovered {_share(kept.best_single[1].to_json())}")
    best = kept.best([name for name, info in found.models.items() if info.role == "model"])
    if best is not None:
        sure = "sure: more than" if best.sure else "not sure: less than"
        say(
            f"  best merge: {best.name}, {_share(best.ahead.to_json(), sign='+')} ahead of {best.second} "
            f"({sure} two standard errors)"
        )
    for domain, known in kept.domains.items():
        if known.reason is not None:
            complain("note", f"{domain} does not count: {known.reason}")
    if not kept.retained:
        complain("note", "every task has an expert, so forgetting cannot be measured; add a task without one")


def _share(value: dict[str, Any] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    error = "" if value["stderr"] is None else f" ±{100 * value['stderr']:.1f}"
    return f"{100 * value['value']:{sign}.1f}{error} %"


def _relative(value: dict[str, Any] | None) -> str:
    if value is None or value["relative"] is None:
        return "-"
    return _share({"value": value["relative"], "stderr": value["relative_stderr"]}, sign="+")
