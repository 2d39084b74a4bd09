"""`python -m benchmarks.quality [run|table] [--set NAME] [--methods NAME,...] [--defaults]`.

`run` merges the real zoo (`python -m benchmarks.zoo real`) by every method and measures what is kept; an interrupted run
continues. First comes every method at its published settings, then each value of its grid on the tune texts, and the
best of them on the test texts. `table` writes docs/quality.md and its plots from results/.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.merge import hardware
from benchmarks.zoo import Zoo, load_zoo
from merganser import evaluate
from merganser.registry import method_names, methods

from . import table

_HERE = Path(__file__).parent
Setting = dict[str, Any]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["run", "table"], nargs="?", default="run")
    parser.add_argument("--set", default="four", help="which experts (see config.json)")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=None, help="some methods only")
    parser.add_argument("--defaults", action="store_true", help="published settings only, nothing is tuned")
    parser.add_argument("--zoo", type=Path, help="folder of the zoo")
    options = parser.parse_args(arguments)
    results = _HERE / "results"
    if options.what == "table":
        table.write(results, _HERE.parents[1] / "docs")
        return 0
    config = json.loads((_HERE / "config.json").read_text(encoding="utf-8"))
    chosen = options.methods or [name for name in method_names() if name not in config["left_out"]]
    zoo = load_zoo("real", options.zoo, experts=config["sets"][options.set]["experts"])
    run(options.set, config, chosen, zoo, results, tune=not options.defaults)
    return 0


def run(name: str, config: Mapping[str, Any], chosen: Sequence[str], zoo: Zoo, results: Path, *, tune: bool) -> None:
    """Measure methods on one set of experts, a file per method and split."""
    results.mkdir(exist_ok=True)
    experts = {domain: zoo.experts[domain] for domain in config["sets"][name]["experts"]}
    bench = _Bench(config, zoo, experts, results / name)
    for method in chosen:
        default = settings(config, method)
        started = time.monotonic()
        bench.measure(method, "default", "test", default)
        if tune:
            grid = [varied(config, method, default, key, value) for key, value in grid_of(config, method)]
            scored = [bench.measure(method, f"grid-{i}", "tune", found) for i, found in enumerate([default, *grid])]
            best = max(range(len(scored)), key=lambda i: scored[i])
            if best:
                bench.measure(method, "tuned", "test", grid[best - 1])
        sys.stdout.write(f"{name} {method}: {time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()


def settings(config: Mapping[str, Any], method: str) -> Setting:
    """Return the published settings of a method: those of config.json, its own defaults otherwise."""
    given = config["methods"].get(method, {})
    return {"each": dict(given.get("each", {})), "shared": dict(given.get("shared", {}))}


def grid_of(config: Mapping[str, Any], method: str) -> list[tuple[str, float]]:
    """Return the values to try of the one parameter that is tuned."""
    own = config["methods"].get(method, {}).get("grid")
    parameters = methods()[method].parameters
    grid = own or {key: values for key, values in config["grids"].items() if key in parameters}
    return [(key, value) for key, values in grid.items() for value in values]


def varied(config: Mapping[str, Any], method: str, default: Setting, key: str, value: float) -> Setting:
    """Return settings with another value of a parameter that all models share."""
    return {"each": default["each"], "shared": {**default["shared"], key: value}}


class _Bench:
    """One set of experts."""

    def __init__(self, config: Mapping[str, Any], zoo: Zoo, experts: Mapping[str, Path], folder: Path) -> None:
        self._config, self._zoo, self._experts, self._folder = config, zoo, experts, folder
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, method: str, label: str, split: str, setting: Setting) -> float:
        """Merge and measure, unless that was done; return the mean recovered (worst where there is none)."""
        seeds = self._config["seeds"] if methods()[method].random and split == "test" else self._config["seeds"][:1]
        found = [self._once(method, label, split, setting, seed) for seed in seeds]
        return sum(found) / len(found)

    def _once(self, method: str, label: str, split: str, setting: Setting, seed: int) -> float:
        file = self._folder / f"{method}.{label}.{seed}.json"
        wanted = {"method": method, "label": label, "split": split, "setting": setting, "seed": seed}
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            if {key: known.get(key) for key in wanted} == wanted:
                return _score(known)
        recipe = self._recipe(method, setting, seed)
        path = self._folder / f".{method}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        try:
            result = {**wanted, **self._evaluate({"merge": str(path)}, split)}
        finally:
            path.unlink()
        result["hardware"] = hardware.describe(self._folder)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return _score(result)

    def _evaluate(self, models: Mapping[str, str], split: str) -> dict[str, Any]:
        domains = [*self._experts, self._zoo.retained]
        # base and experts are measured once per split: the journal beside the file knows them
        journal = self._folder / f"all.{split}.json"
        evaluation = evaluate(
            models,
            {domain: self._zoo.texts[domain][split] for domain in domains},
            base=str(self._zoo.base),
            experts={domain: str(path) for domain, path in self._experts.items()},
            limit=self._config["windows"],
            context=self._config["context"],
            stride=self._config["context"],
            json=journal,
        )
        content = json.loads(journal.read_text(encoding="utf-8"))
        return {
            "retention": content["retention"]["models"]["merge"],
            "gains": {domain: found["gain"] for domain, found in content["retention"]["domains"].items()},
            "seconds": evaluation.models["merge"].seconds,
            "peak_memory": evaluation.peak_memory,
            "failed": evaluation.models["merge"].failed,
            "bits_per_byte": {
                name: {
                    task: outcome.metrics["bits_per_byte"].value for task, outcome in tasks.items() if outcome.metrics
                }
                for name, tasks in evaluation.outcomes.items()
            },
        }

    def _recipe(self, method: str, setting: Setting, seed: int) -> dict[str, Any]:
        recipe: dict[str, Any] = {
            "merge_method": method,
            "models": [
                {"model": str(path), "parameters": setting["each"]} if setting["each"] else {"model": str(path)}
                for path in self._experts.values()
            ],
            "dtype": "float32",
            "random_seed": seed,
        }
        if methods()[method].base != "unused":
            recipe["base_model"] = str(self._zoo.base)
        if setting["shared"]:
            recipe["parameters"] = setting["shared"]
        return recipe


def _score(result: Mapping[str, Any]) -> float:
    mean = table.mean_recovered(result)
    return float("-inf") if mean is None else mean[0]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
