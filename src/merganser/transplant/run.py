"""Transplant a tokenizer: plan a model with the rows of another tokenizer's tokens, and write it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.planner.planner import build_plan
from ..engine.run import Progress, Result, run_plan
from ..errors import MergeError, ParameterError, did_you_mean
from ..recipe import load_recipe
from .approximate import method_named
from .match import match_tokenizer
from .merged import PARTS, match_merged, read_texts
from .romanised import MODES, match_romanised

if TYPE_CHECKING:
    from ..engine.plan.plan import Plan

__all__ = ["plan_merged_tokens", "plan_romanised", "plan_transplant", "transplant"]

_PLACE = re.compile(r"^<recipe>[^ ]*( [\w.\[\]]+)?: ")


def plan_transplant(
    model: str,
    tokenizer: str,
    *,
    method: str = "omp",
    k: int | None = None,
    threads: int | None = None,
    advance: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Plan:
    """Compute how the rows of new tokens are made, and plan the model that has them; nothing is written.

    Args:
        model: Folder or Hub id of the model.
        tokenizer: Folder or Hub id of the donor: the model whose tokenizer the output gets. Methods that look at its
            embedding need its weights; `subword`, `mean` and `zero` do not.
        method: Name of the method, one of `METHODS`.
        k: Number of rows that are combined, for methods that choose some; by default the method's own.
        threads: Threads that compute; by default one per core, at most 8.
        advance: Called with the number of tokens done, and of all.
        **options: As for `merganser.engine.planner.planner.build_plan`.

    Raises:
        ParameterError: The method is not known, or takes no `k`.
        MergeError: The model or the donor cannot be read, or they do not fit.
    """
    chosen = method_named(method)
    if k is not None and (k < 1 or not chosen.k):
        raise ParameterError(f"--k {k}: {'at least 1 is needed' if chosen.k else f'{method} combines no chosen rows'}")
    settings = {"method": method, **({"k": k or chosen.k} if chosen.k else {})}
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    match = partial(match_tokenizer, settings=settings, threads=threads, advance=advance)
    return _plan(
        model, said, match, f"tokenizer_source: {{path: {json.dumps(tokenizer)}}}\n", threads=threads, **options
    )


def plan_romanised(
    model: str,
    mode: str,
    *,
    threads: int | None = None,
    advance: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Plan:
    """Plan a model that also has the pieces of its vocabulary in Latin letters; nothing is written.

    Args:
        model: Folder or Hub id of the model, whose tokenizer is of SentencePiece's Unigram kind.
        mode: Which of several pieces of one spelling counts, one of `MODES`.
        threads: Threads that write; by default one per core, at most 8.
        advance: Called with the number of pieces romanised, and of all.
        **options: As for `merganser.engine.planner.planner.build_plan`.

    Raises:
        ParameterError: The mode is not known.
        UnsupportedError: The model's vocabulary is of another kind, or the package uroman is not installed.
        MergeError: The model cannot be read.
    """
    if mode not in MODES:
        raise ParameterError(f"--romanise {mode}: is not known.{did_you_mean(mode, MODES)} Known: {', '.join(MODES)}")
    match = partial(match_romanised, mode=mode, advance=advance)
    return _plan(model, f"romanise {mode}", match, threads=threads, **options)


def plan_merged_tokens(
    model: str,
    files: Sequence[str | Path],
    count: int,
    *,
    parts: str = "mean",
    train_steps: int = 0,
    threads: int | None = None,
    advance: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Plan:
    """Plan a model that also has tokens for frequent pairs of its own tokens; nothing is written.

    Args:
        model: Folder or Hub id of the model, whose tokenizer is byte-pair encoding.
        files: Files of text (UTF-8) in which pairs are counted.
        count: Number of new tokens.
        parts: Which parts make the row of a new token, one of `PARTS`.
        train_steps: Steps in which a small network is trained on the text, with the model as it is, to make better rows
            than the mean of the parts; 0 for none.
        threads: Threads that write; by default one per core, at most 8.
        advance: Called with the number of new tokens, and of all; then with the steps of training.
        **options: As for `merganser.engine.planner.planner.build_plan`.

    Raises:
        ParameterError: The number, the parts or the steps are not allowed.
        DataError: A file cannot be read, no pair occurs twice, or the text is too short to train on.
        UnsupportedError: The model's vocabulary is of another kind, rows of it cannot be trained, or a package is not
            installed.
        MergeError: The model cannot be read.
    """
    if count < 1:
        raise ParameterError(f"--new-tokens {count}: at least 1 is needed")
    if parts not in PARTS:
        raise ParameterError(f"--parts {parts}: is not known.{did_you_mean(parts, PARTS)} Known: {', '.join(PARTS)}")
    if train_steps < 0:
        raise ParameterError(f"--train-steps {train_steps}: at least 0 is needed")
    if train_steps and parts != "mean":
        raise ParameterError(f"--train-steps: begins at the mean of the parts, so leave --parts {parts} out")
    texts = read_texts(files)
    match = partial(match_merged, texts=texts, count=count, parts=parts, steps=train_steps, advance=advance)
    said = f"{count} new tokens, parts {parts}" + (f", {train_steps} steps of training" if train_steps else "")
    return _plan(model, said, match, threads=threads, **options)


def _plan(model: str, said: str, match: Callable[..., Any], more: str = "", **options: Any) -> Plan:
    """Plan a recipe of one model, whose rows `match` changes."""
    text = (
        f"# merganser transplant: {said}\n"
        f"merge_method: passthrough\nmodels: [{{model: {{path: {json.dumps(model)}}}}}]\n{more}"
    )
    try:
        return build_plan(load_recipe(text), match=match, **options)
    except MergeError as error:
        # the recipe is ours, so its lines say nothing to the user
        raise type(error)(_PLACE.sub("", str(error))) from None


def transplant(
    model: str,
    tokenizer: str,
    out: str | Path,
    *,
    method: str = "omp",
    k: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    advance: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Result:
    """Write a model with the tokenizer of another one.

    Rows of tokens that both have are copied. Those of new tokens are made by the method from rows of the model, in
    float64, and rounded once to the dtype of its embedding. All other tensors are copied.

    Args:
        model: As for `plan_transplant`.
        tokenizer: As for `plan_transplant`.
        out: Target folder; it appears when it is complete.
        method: As for `plan_transplant`.
        k: As for `plan_transplant`.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        fresh: Start again even if an interrupted run could be continued.
        progress: Receives reports of the writing.
        advance: As for `plan_transplant`.
        **options: As for `merganser.engine.planner.planner.build_plan`.

    Raises:
        MergeError: As for `plan_transplant`, or the target cannot be written.
        Interrupted: Ctrl-C was pressed; the same call continues the run.
    """
    from ..engine.output.staging import check_target

    check_target(Path(out), overwrite=overwrite)
    plan = plan_transplant(model, tokenizer, method=method, k=k, advance=advance, **options)
    return run_plan(plan, Path(out), overwrite=overwrite, fresh=fresh, progress=progress)
