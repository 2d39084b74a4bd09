"""`scripts/bench fusion [run|measure|table] [options]`: fusion by training beside plain fine-tuning on the same batches.

`run` has three experts of the real zoo (`python -m benchmarks.zoo real`) say what they predict on train text of their domains,
all of them on all of it, trains the base and the average of the experts on it, each beside its control, by `merganser fuse cache` and `merganser fuse
train`, and measures all of them on the test texts. What is there is not made again, and a killed command continues, so that
`run` can be called again after a kill. `measure` measures the models that are there. `table` writes the tables of docs/fuse.md.
Settings are in config.json; a model of other settings is made beside those of earlier ones.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.merge import hardware
from benchmarks.merge.measure import CommandError, as_json, run
from benchmarks.zoo import Zoo, load_zoo
from benchmarks.zoo.sources import cache_folder
from merganser import evaluate
from merganser.calibration.single.preparation import read
from merganser.distillation import open_cache
from merganser.distillation.texts import record_number
from merganser.distillation.training.sequences import Cached, read_cache
from merganser.evaluation.result import Evaluation
from merganser.evaluation.scoring.estimate import Estimate, mean

from . import table
from .jobs import Config, Job, jobs, perform

_HERE = Path(__file__).parent
_DAY = 86400.0


class WrongResultError(RuntimeError):
    """A training and its control do not begin alike."""


def main(arguments: list[str]) -> int:
    config: dict[str, Any] = json.loads((_HERE / "config.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="scripts/bench fusion", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["run", "measure", "table"], nargs="?", default="run")
    parser.add_argument("--runs", type=lambda text: text.split(","), default=[*config["runs"]], metavar="NAME,...")
    parser.add_argument("--processes", type=int, default=2, help="commands at once, one thread each")
    parser.add_argument("--work", type=Path, default=cache_folder() / "fusion", help="folder for caches and models")
    parser.add_argument("--zoo", type=Path, help="folder of the zoo")
    parser.add_argument("--results", type=Path, default=_HERE / "results.json")
    parser.add_argument("--docs", type=Path, default=_HERE.parents[1] / "docs" / "fuse.md", help="page of the tables")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.runs if name not in config["runs"]]:
        parser.error(f"--runs: there is no {unknown[0]}; there are {', '.join(config['runs'])}")
    if options.what == "table":
        known = options.results.exists()
        table.write(options.docs, json.loads(options.results.read_text(encoding="utf-8")) if known else None)
        return 0
    zoo = load_zoo("real", options.zoo, experts=config["experts"])
    made = jobs(config, zoo, options.work, options.runs)
    results = _Results(options.results, config, options.work)
    try:
        if options.what == "run":
            perform(made, options.processes, results.do)
        results.measure(zoo, {job.name: job.out for job in made if job.out.exists()})
    except (CommandError, WrongResultError) as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    return 0


class _Results:
    """The file of results, which is written after every command.

    Args:
        file: The file.
        config: What config.json says.
        work: Folder for caches and models.
    """

    def __init__(self, file: Path, config: Config, work: Path) -> None:
        self._file, self._config, self._work = file, config, work
        self._lock = Lock()
        self._content: dict[str, Any] = {"commands": {}}
        if file.exists():
            self._content = json.loads(file.read_text(encoding="utf-8"))
        self._note(machine=hardware.describe(work), config=dict(config))

    def do(self, job: Job) -> None:
        """Run a command, and note what it took."""
        job.out.parent.mkdir(parents=True, exist_ok=True)
        surroundings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        log = self._work / f"{job.name.replace(' ', '-')}.log"
        usage = run(job.command, log, timeout=_DAY, environment=surroundings)
        with self._lock:
            self._content["commands"][job.name] = as_json(usage)
        self._note()
        sys.stdout.write(f"{job.name}: {usage.cpu_seconds:.0f} s of a processor\n")
        sys.stdout.flush()

    def measure(self, zoo: Zoo, made: Mapping[str, Path]) -> None:
        """Measure the models that are there, and note it."""
        trained = {name: path for name, path in made.items() if name in self._config["runs"]}
        histories = {name: _history(path) for name, path in trained.items()}
        _check_alike(self._config, histories)
        models = {name: str(path) for name, path in made.items() if name == "average" or name in trained}
        domains = self._config["experts"]
        found = evaluate(
            models,
            {domain: zoo.texts[domain]["test"] for domain in (*domains, zoo.retained)},
            base=str(zoo.base),
            experts={domain: str(zoo.experts[domain]) for domain in domains},
            limit=self._config["windows"],
            context=self._config["context"],
            stride=self._config["context"],
            json=self._work / "test.json",
        )
        beside = {name: self._config["runs"][name].get("beside") for name in trained}
        self._note(
            likeliest=_likeliest(zoo, domains, [made[expert] for expert in domains if expert in made]),
            trainings={name: _training(path) for name, path in trained.items()},
            windows={task: info.items for task, info in found.tasks.items()},
            dtype=found.settings["dtype"],
            bits_per_byte={model: _all(found, model) for model in found.models},
            beside={
                name: {"control": control, **_differences(found, name, control, domains)}
                for name, control in beside.items()
                if control in trained
            },
            beside_average={
                name: _differences(found, name, "average", domains) for name in trained if "average" in models
            },
        )

    def _note(self, **more: Any) -> None:
        with self._lock:
            self._content |= more
            self._file.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge.json").read_text(encoding="utf-8"))
    return found


def _history(folder: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = _record(folder)["fused"]["history"]["fused"]
    return found


def _training(folder: Path) -> dict[str, Any]:
    """Return what a run record says of a training."""
    record, history = _record(folder), _history(folder)
    own = record["fused"]
    sources = [{"nats_per_token": each["nats_per_token"], "tokens": each["tokens_taught"]} for each in own["sources"]]
    return {
        **{key: own[key] for key in ("steps", "sequences", "tokens")},
        "continued": record["continued"],
        "sources": sources,
        "first_text_loss": history[0]["text"],
        "last_text_loss": history[-1]["text"],
    }


def _likeliest(zoo: Zoo, domains: list[str], caches: list[Path]) -> dict[str, dict[str, int]]:
    """Return for each domain on how many of its sequences each expert has the lowest cross-entropy, as MinCE chooses."""
    if len(caches) < len(domains):
        return {}
    numbers = {}
    for domain in domains:
        (record,) = read([zoo.texts[domain]["train"]])[0].records
        numbers[record_number(record)] = domain
    nats = [[(own.record, -float(own.token_log_probabilities.sum())) for own in _sequences(path)] for path in caches]
    found = {domain: dict.fromkeys(domains, 0) for domain in domains}
    for each in zip(*nats, strict=True):
        best = min(range(len(domains)), key=lambda i: each[i][1])
        found[numbers[each[0][0]]][domains[best]] += 1
    return found


def _sequences(folder: Path) -> Iterator[Cached]:
    return read_cache(open_cache(folder))


def _check_alike(config: Config, histories: Mapping[str, list[dict[str, float]]]) -> None:
    """Check that a training and its control read the same first batch: its text has the same loss.

    Raises:
        WrongResultError: It has not.
    """
    for name, own in histories.items():
        other = histories.get(config["runs"][name].get("beside"))
        if other is not None and abs(own[0]["text"] - other[0]["text"]) > 1e-5:
            raise WrongResultError(
                f"{name}: the text of its first batch has {own[0]['text']} nats per token, and that of its control "
                f"{other[0]['text']}: they were not trained on the same batches"
            )


def _all(found: Evaluation, model: str) -> dict[str, Any]:
    return {task: _json(found.metric(model, task)) for task in found.tasks}


def _differences(found: Evaluation, model: str, other: str, domains: list[str]) -> dict[str, Any]:
    """Return the bits per byte of a model less those of another one, and their mean over the domains."""
    own = {task: found.difference(model, other, task) for task in found.tasks}
    known = [each for task, each in own.items() if task in domains and each is not None]
    return {**{task: _json(each) for task, each in own.items()}, "mean": _json(mean(known) if known else None)}


def _json(value: Estimate | None) -> dict[str, float | None] | None:
    return None if value is None else value.to_json()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
