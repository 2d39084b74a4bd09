"""`python -m benchmarks.quality [run|check|auto|table] [--set NAME] [--methods NAME,...] [--tune] [--restored] [--tokens]`.

`run` merges the real zoo (`python -m benchmarks.zoo real`) by every method at its published settings and measures what is
kept. `--tune` then tries each value of a method's grid on the tune texts (and others beyond it, while the best lies at its edge),
and the best of them on the test texts. `--restored`
measures, of methods with sidecars, the model of each task on its own domain. Methods that take statistics from data get those
of each expert on its train text, which are made once and kept; `--tokens` also measures them with statistics of fewer tokens,
`--sequences 16` with those of 4,096 alone, which `--tune` then tunes with, too. A variant of a method, such as `featcal+wudi`, is a row of its own in config.json.
`--shipped` takes the adapters of the repository, unpacked by `scripts/demo`, for the real zoo's. `--set factors` merges
the adapters from their factors; its rows are in config.json. Each result is a line of results/SET.jsonl; what is
there is not measured again. `check` measures the same anew, beside them, and prints both figures. `auto` lets `merganser auto`
choose within `--minutes` (and `--by search`, or both, a search over weights), and adds what it keeps to results/auto.jsonl. `table`
writes docs/quality.md and its plots.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.merge import hardware
from benchmarks.zoo import Zoo, load_zoo, shipped
from benchmarks.zoo.shipped import apply
from merganser import MergeError, merge
from merganser.errors import OutputError

from . import chosen as choices
from . import factors, restored, settings, table
from .calibrated import Statistics, takes_data
from .measured import measured
from .settings import Setting, method_of

_HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["run", "check", "auto", "table"], nargs="?", default="run")
    parser.add_argument("--set", default="four", help="which experts (see config.json)")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=None, help="some methods only")
    parser.add_argument("--windows", type=int, help="windows of each test text (default: those of config.json)")
    parser.add_argument("--tune", action="store_true", help="tune, too")
    parser.add_argument("--restored", action="store_true", help="measure restored tasks, too")
    parser.add_argument("--tokens", action="store_true", help="measure methods with data on fewer tokens, too")
    parser.add_argument(
        "--sequences", type=int, help="measure methods with data on so many sequences of each text alone"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="time of auto, and of search")
    parser.add_argument("--limit", type=int, help="windows of each tune text for auto and search (default: all)")
    parser.add_argument("--by", type=lambda text: text.split(","), default=["auto"], help="auto, search")
    parser.add_argument("--shipped", action="store_true", help="take the unpacked adapters of the repository")
    parser.add_argument("--work", type=Path, help="folder for what is kept meanwhile (default: in the zoo)")
    parser.add_argument("--threads", type=int, default=None, help="threads (default: as torch and merganser choose)")
    parser.add_argument("--zoo", type=Path, help="folder of the zoo")
    options = parser.parse_args(arguments)
    results = _HERE / "results"
    if options.what == "table":
        table.write(results, _HERE.parents[1] / "docs", settings.load_config())
        return 0
    config = settings.load_config()
    config |= {} if options.windows is None else {"windows": options.windows}
    known = settings.rows(config)
    chosen = options.methods or known
    if options.set != "factors" and (unknown := [name for name in chosen if name not in known]):
        reason = config["left_out"].get(unknown[0])
        parser.error(f"--methods: {unknown[0]} is " + (f"left out: {reason}" if reason else "not a row of config.json"))
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.set == "factors" and (options.what != "run" or options.tune or options.restored or options.tokens):
        parser.error("--set factors is measured by `run` at the settings of config.json alone")
    zoo = shipped.unpacked(options.zoo) if options.shipped else load_zoo("real", options.zoo, experts=())
    work = options.work or zoo.folder / "quality"
    wanted = {
        "tune": options.tune,
        "restored_too": options.restored,
        "fewer_too": options.tokens,
        "only": options.sequences,
    }
    try:
        if options.what == "auto":
            _choose(options, config, zoo, results, work)
        elif options.set == "factors":
            factors.run(config, zoo, results, work, options.methods)
        elif options.what == "run":
            run(options.set, config, chosen, zoo, results, work, **wanted)
        else:
            again = work / "check"
            run(options.set, config, chosen, zoo, again, again, **wanted)
            print(table.compared(results / f"{options.set}.jsonl", again / f"{options.set}.jsonl"))
            shutil.rmtree(again)
    except OutputError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    name: str,
    config: Mapping[str, Any],
    chosen: Sequence[str],
    zoo: Zoo,
    results: Path,
    work: Path,
    *,
    tune: bool,
    restored_too: bool,
    fewer_too: bool = False,
    only: int | None = None,
) -> None:
    """Measure methods on one set of experts; continue from the results there, and from what was measured in the folder `work`.

    With `only`, methods with data are measured and tuned on so many sequences of each text, and in no other way.
    """
    results.mkdir(parents=True, exist_ok=True)
    bench = _bench(config, zoo, name, results / f"{name}.jsonl", work)
    for method in chosen:
        if not bench.suits(method):
            continue
        default = settings.published(config, method)
        started = time.monotonic()
        with_data = takes_data(method_of(method))
        alone = only if with_data else None
        counts = [only] if only else config["calibration"]["fewer"] if fewer_too else []
        if alone is None:
            bench.measure(method, "default", "test", default)
        for sequences in counts if with_data else ():
            bench.measure(method, f"{sequences} sequences", "test", default, sequences)
        if tune:
            best = bench.tuned(method, alone)
            if best not in (None, default):
                label = "tuned" if alone is None else f"tuned, {alone} sequences"
                bench.measure(method, label, "test", best, alone)
        if restored_too and method_of(method).sidecar:
            bench.measure_restored(method, default)
        sys.stdout.write(f"{name} {method}: {time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()


def _choose(options: argparse.Namespace, config: Mapping[str, Any], zoo: Zoo, results: Path, work: Path) -> None:
    """Let auto, or a search, choose for a set of experts, and measure what it chose."""
    results.mkdir(parents=True, exist_ok=True)
    name = options.set
    bench = _bench(config, zoo, name, results / choices.FILE, work)
    found = choices.measure(
        name,
        zoo,
        bench.experts,
        bench.evaluate,
        results,
        work,
        minutes=options.minutes,
        limit=options.limit,
        context=config["context"],
        windows=config["windows"],
        kinds=options.by,
    )
    for line in found:
        sys.stdout.write(f"{name} {line['kind']}: {table.figures(line)}\n")


def experts_of(zoo: Zoo, chosen: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Return the models to merge by the domain that each was trained for.

    Args:
        zoo: The zoo.
        chosen: Their names, under "experts", "adapters" or "pair".

    Raises:
        FileNotFoundError: One was not made yet.
    """
    found: dict[str, Path] = {}
    for domain in chosen.get("experts", ()):
        found[domain] = zoo.experts[domain]
    for name in chosen.get("pair", ()):
        found[f"pair_{name}"] = zoo.pair[name]
    for path in found.values():
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: not made yet. Finish the zoo: python -m benchmarks.zoo real")
    for domain in chosen.get("adapters", ()):
        if domain not in zoo.adapters:
            # unpacked: on its base already
            found[domain] = zoo.experts[domain]
            continue
        found[domain] = zoo.folder / "applied" / domain
        trained = max(file.stat().st_mtime for file in zoo.adapters[domain].iterdir())
        if not found[domain].is_dir() or found[domain].stat().st_mtime < trained:
            shutil.rmtree(found[domain], ignore_errors=True)
            apply(zoo.base, zoo.adapters[domain], found[domain])
    return found


class _Bench:
    """One set of experts, whose results are lines of a file."""

    def __init__(
        self,
        config: Mapping[str, Any],
        zoo: Zoo,
        experts: Mapping[str, Path],
        statistics: Statistics,
        file: Path,
        folder: Path,
    ) -> None:
        self.experts = experts
        self._config, self._zoo, self._file = config, zoo, file
        self._statistics = statistics
        self._known = table.read(file)
        table.drop_rest(file)
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)

    def suits(self, method: str) -> bool:
        """Whether a method takes so many models."""
        declared, count = method_of(method), len(self._merged(method)[1])
        return declared.min_models <= count <= (declared.max_models or count)

    def measure(self, method: str, label: str, split: str, setting: Setting, sequences: int | None = None) -> float:
        """Merge and measure, unless that was done; return the mean recovered (worst where there is none).

        `sequences` is how many a method with data is calibrated on, where it is not the number in config.json.
        """
        seeds = self._config["seeds"] if method_of(method).random and split == "test" else self._config["seeds"][:1]
        found = [self._once(method, label, split, setting, seed, self._evaluate_merge, sequences) for seed in seeds]
        return sum(found) / len(found)

    def tuned(self, method: str, sequences: int | None = None) -> Setting | None:
        """Return the setting that keeps most on the tune texts; None where there is nothing to tune.

        Where the best value is the least or the largest of the grid, values beyond it are tried. `sequences` as in `measure`.
        """
        scored: list[tuple[Setting, float]] = []
        left = settings.grid(self._config, method)
        while left:
            for found in left:
                scored.append((found, self.measure(method, f"grid-{len(scored)}", "tune", found, sequences)))
            enough = len(scored) >= len(settings.grid(self._config, method)) + self._config["most_wider"]
            more = None if enough else settings.wider(self._config, method, scored)
            left = [] if more is None or more in [one for one, _ in scored] else [more]
        return max(scored, key=lambda one: one[1])[0] if scored else None

    def measure_restored(self, method: str, setting: Setting) -> None:
        """Merge with sidecars, and measure what each task's own model keeps, unless that was done."""
        self._once(method, "restored", "test", setting, self._config["seeds"][0], self._evaluate_restored)

    def _once(
        self,
        method: str,
        label: str,
        split: str,
        setting: Setting,
        seed: int,
        measure: Callable[[Path, str], Any],
        sequences: int | None = None,
    ) -> float:
        lengths = {key: self._config[key] for key in ("windows", "context")}
        wanted = {"method": method, "label": label, "split": split, "setting": setting, "seed": seed, **lengths}
        wanted["version"] = method_of(method).version
        if takes_data(method_of(method)):
            wanted["calibration"] = self._statistics.settings(sequences)
        for known in self._known:
            if {**{key: known.get(key) for key in wanted}, "version": table.version(known)} == wanted:
                return _score(known)
        # a plus in the name of a model stands before an adapter
        recipe = self._folder / f"{method.replace('+', '-')}.yaml"
        try:
            recipe.write_text(yaml.safe_dump(self._recipe(method, setting, seed, sequences)), encoding="utf-8")
            result = {**wanted, **measure(recipe, split)}
        except OutputError:
            # of the disk, or another run on this set: says nothing of the method
            raise
        except MergeError as error:
            result = {**wanted, "retention": None, "failed": str(error).replace(str(self._zoo.folder), "zoo")}
        result["hardware"] = hardware.describe(self._folder)
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")
        return _score(result)

    def _evaluate_merge(self, recipe: Path, split: str) -> dict[str, Any]:
        return self.evaluate(str(recipe), self.experts, split)

    def _evaluate_restored(self, recipe: Path, split: str) -> dict[str, Any]:
        out = self._folder / "restored"
        stored = merge(recipe, out, overwrite=True).record["sidecars"]
        parts = {
            domain: self.evaluate(f"{out}#{task['name']}", {domain: self.experts[domain]}, split)
            for domain, task in zip(self.experts, stored["tasks"], strict=True)
        }
        shutil.rmtree(out)
        return restored.combined(parts, stored)

    def evaluate(self, model: str, experts: Mapping[str, Path], split: str) -> dict[str, Any]:
        """Measure a model on texts, and what it keeps of the experts."""
        return measured(model, experts, self._zoo, self._config, split, self._folder)

    def _recipe(self, method: str, setting: Setting, seed: int, sequences: int | None) -> dict[str, Any]:
        base, models = self._merged(method)
        recipe: dict[str, Any] = {
            "merge_method": method_of(method).name,
            "models": [
                {"model": str(path), "parameters": setting["each"]} if setting["each"] else {"model": str(path)}
                for path in models
            ],
            "dtype": "float32",
            "random_seed": seed,
        }
        for entry, path in zip(recipe["models"], models, strict=True):
            if takes_data(method_of(method)):
                domain = next(domain for domain, expert in self.experts.items() if expert == path)
                entry |= self._statistics.of(domain, method_of(method), sequences)
        if base:
            recipe["base_model"] = str(base)
        if setting["shared"]:
            recipe["parameters"] = setting["shared"]
        return recipe

    def _merged(self, method: str) -> tuple[Path | None, list[Path]]:
        """Return the base and the models of a recipe: the first expert is the base of methods that take one model."""
        declared, models = method_of(method), list(self.experts.values())
        if declared.base == "required" and declared.max_models == 1:
            return models[0], models[1:]
        return None if declared.base == "unused" else self._zoo.base, models


def _score(result: Mapping[str, Any]) -> float:
    mean = table.mean_recovered(result)
    return float("-inf") if mean is None else mean[0]


def _bench(config: Mapping[str, Any], zoo: Zoo, name: str, file: Path, work: Path) -> _Bench:
    experts = experts_of(zoo, config["sets"][name])
    # statistics of one expert serve every set of its zoo
    statistics = Statistics(config, zoo, experts, work / "statistics" / zoo.folder.name)
    return _Bench(config, zoo, experts, statistics, file, work / name)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
