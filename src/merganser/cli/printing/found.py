"""Show the trials of a search while they run, and what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MergeError
from ...search.auto.choice import FIGURES
from ...search.ends import difference
from ...wording import measured_text, plural, setting_text, time_text
from .text import complain, head, say, table

if TYPE_CHECKING:
    from ...search import Found, Trial
    from ...search.auto.choice import Choice
    from ...search.difference import Difference
    from ...search.ends import End


class SearchProgress:
    """Prints a line for each trial; implements `merganser.search.Progress`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._of: int | None = None

    def begin(self, trial: int, of: int | None) -> None:
        """Remember how many trials there will be."""
        self._of = of

    def over(self, trial: Trial, best: Trial | None) -> None:
        """Print a trial."""
        if self._quiet:
            return
        of = "" if self._of is None else f"/{self._of}"
        name = f"trial {trial.number + 1}{of}"
        if trial.label:
            # a recipe of `auto` (their number is known), or a trial around one, which has its name
            name = trial.label if self._of is None else f"recipe {trial.number + 1}{of}  {trial.label}"
        say(f"{name}  {_outcome(trial)}{_mark(trial, best)}  {time_text(trial.seconds)}")

    def note(self, text: str) -> None:
        """Print a note."""
        if not self._quiet:
            complain("note", text)

    def measuring(self, model: str) -> None:
        """Report which model is measured that merges are compared with."""
        if not self._quiet:
            say(f"measuring {model}")

    def testing(self, model: str) -> None:
        """Report which model is measured on the items held out."""
        if not self._quiet:
            say(f"at the end: measuring {model}")


def _outcome(trial: Trial) -> str:
    if trial.values is None:
        return f"failed: {trial.failed}"
    stderr = [*trial.stderr, *[None] * len(trial.values)]
    return "  ".join(measured_text(value, error) for value, error in zip(trial.values, stderr, strict=False))


def _mark(trial: Trial, best: Trial | None) -> str:
    if trial.same_as is not None:
        return f"  as trial {trial.same_as + 1}, not scored again"
    if trial.stopped:
        return f"  estimated, ended after {plural(trial.items, 'item')}"
    if trial.values is not None and not trial.feasible:
        return "  misses a bound"
    return "  best so far" if best is not None and best.number == trial.number else ""


def print_found(found: Found) -> None:
    """Print what a search found: settings of the winner, and the held-out test."""
    objectives = ", ".join(f"{o.text} ({'higher' if o.sign > 0 else 'lower'} is better)" for o in found.objectives)
    head(f"{plural(len(found.trials), 'trial')} · {found.sampler} · {objectives}")
    best = found.best
    if best is None:
        return
    if len(found.objectives) == 1:
        say(f"the best is trial {best.number + 1}")
    else:
        say(f"{plural(len(found.front), 'trial')} that no other beats in all objectives")
    for trial in found.front:
        if len(found.front) > 1:
            say(f"trial {trial.number + 1}: {_outcome(trial)}, {found.recipe_file(trial)}")
        for line in table([[name, setting_text(value)] for name, value in trial.settings.items()]):
            say(line)
    if found.held_out:
        say(f"measured on {plural(found.held_out, 'item')} that no trial saw (± standard error)")
    else:
        say(
            "as the command says, which scored the trials, too: nothing was held out, so this is not a test of the winner"
        )
    for line in table(_rows(found)):
        say(line)
    for line in _verdict(found):
        say(line)
    where = found.folder / "winner.yaml" if len(found.objectives) == 1 else found.recipe_file(best)
    say(f"wrote {where}; merganser merge {where} OUT makes it")


def _rows(found: Found) -> list[list[str]]:
    winner = next((end for end in found.ends if end.role == "winner" and end.values), None)
    first = found.front[0].name if len(found.front) > 1 else "the winner"
    what = f" in {found.objectives[0].text}" if len(found.objectives) > 1 else ""
    interval = " (95 % interval)" if found.held_out else ""
    rows = [["model", *(o.text for o in found.objectives), f"{first} is better by{what}{interval}"]]
    for end in found.ends:
        if end.values is None:
            rows.append([_named(end, found), f"failed: {end.failed}"])
            continue
        cells = [measured_text(value.value, value.stderr if value.parts else None) for value in end.values]
        better = ""
        if winner is not None and winner.values and end is not winner:
            better = _difference(difference(winner.values[0], end.values[0], found.objectives[0]))
        rows.append([_named(end, found), *cells, better])
    return rows


def _named(end: End, found: Found) -> str:
    if end.role != "winner":
        return end.name
    return f"{end.name} (winner)" if len(found.objectives) == 1 else f"{end.name} (front)"


def _difference(found: Difference) -> str:
    if found.interval is None:
        return f"{found.value:+.4f}"
    return f"{found.value:+.4f} ({found.interval[0]:+.4f} to {found.interval[1]:+.4f})"


def _verdict(found: Found) -> list[str]:
    """Return what the held-out test says, in sentences."""
    if len(found.objectives) > 1 or not any(end.role == "winner" and end.values for end in found.ends):
        return []
    lines = [gap.sentence(end.name, end.role) for end, gap in found.against]
    best = found.best
    if best is not None and best.values and found.held_out:
        whole = sum(trial.same_as is None and trial.failed is None for trial in found.trials)
        lines.append(
            f"on the items of the trials the winner had {best.values[0]:.4f}; as the best of {whole} there, it looks better than it is"
        )
    return lines


def print_choice(found: Choice) -> None:
    """Print what `auto` made of some models."""
    head(found.what_was_tried)
    say(f"the winner is {found.winner}{_is_average(found)}, chosen from {plural(found.chosen_from, 'recipe')}")
    say("share of the gain of the best model of each task over the base that is kept: " + found.domains_text)
    say(f"measured on {plural(found.held_out, 'item')} that nothing was chosen on (± standard error)")
    for line in table(_kept(found)):
        say(line)
    for end, gap in found.study.against:
        say(gap.sentence(end.name, end.role))
    if found.merged is not None:
        say(f"wrote {found.merged}, by the recipe {found.folder / 'winner.yaml'}")
    elif found.recommended == "average":
        recipe = found.folder / "recipes" / "average.yaml"
        say(f"take {found.what_to_use}: nothing that was tried is better; merganser merge {recipe} OUT makes it")
    else:
        say(f"take {found.what_to_use}: nothing that was tried is better; nothing was merged")
    if found.advice is not None:
        complain("note", found.advice)


def _is_average(found: Choice) -> str:
    return ", the average" if all(end.role != "average" for end in found.ends) else ""


def _kept(found: Choice) -> list[list[str]]:
    """Return the held-out test as rows: what each model keeps and forgets on the items held out."""
    shown = [name for name in FIGURES if any(name in figures for figures in found.kept.values())]
    rows = [["model", *(FIGURES[name] for name in shown), "the winner keeps more by (95 % interval)"]]
    for end in found.ends:
        if end.values is None:
            rows.append([end.name, f"failed: {end.failed}"])
            continue
        figures = found.kept[end.name]
        cells = [measured_text(*figures[name]) if name in figures else "" for name in shown]
        rows.append([end.name, *cells, _difference(end.better[0]) if end.better else ""])
    return rows


def write_page(folder: Path, *, quiet: bool) -> None:
    """Write the page of a search; what is found does not depend on it."""
    from ...report import write_report

    try:
        page = write_report(folder, overwrite=True)
    except MergeError as error:
        complain("note", f"no page was written: {error}")
        return
    if not quiet:
        say(f"wrote {page}; open it in a browser")
