"""The commands of the benchmark: each writes a folder, and is left out where that is there."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.zoo import Zoo

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A command that writes a folder.

    Args:
        name: What it is called in the results.
        out: The folder.
        arguments: Of merganser.
        needs: Folders that must be there before.
    """

    name: str
    out: Path
    arguments: tuple[str, ...]
    needs: tuple[Path, ...] = ()

    @property
    def command(self) -> list[str]:
        """The command."""
        return [sys.executable, "-m", "merganser", *self.arguments, "--quiet"]


def average(config: Config, zoo: Zoo) -> dict[str, Any]:
    """Return the recipe of the average of the experts, in the dtype of the base."""
    experts = [str(zoo.experts[domain]) for domain in config["experts"]]
    models = [{"model": expert, "parameters": {"weight": 1.0}} for expert in experts]
    return {"merge_method": "linear", "models": models, "dtype": "bfloat16"}


def jobs(config: Config, zoo: Zoo, work: Path, wanted: Sequence[str]) -> list[Job]:
    """Return the commands, in the order in which they are worth most if there is no time for all.

    Args:
        config: What config.json says.
        zoo: The models and texts.
        work: Folder for caches, recipes and models.
        wanted: Names of the trainings.
    """
    recipe = work / "average.yaml"
    _write(recipe, average(config, zoo))
    merge = Job("average", work / "average", ("merge", str(recipe), str(work / "average")))
    caches = [_cache(config, zoo, work, expert) for expert in config["experts"]]
    return [*caches, merge, *(_training(config, zoo, work, name, caches) for name in config["runs"] if name in wanted)]


def _cache(config: Config, zoo: Zoo, work: Path, expert: str) -> Job:
    """Return the command that caches what an expert says on the texts of all domains, of each as many sequences."""
    own = config["cache"]
    out = work / "caches" / f"{expert}-{'-'.join(f'{key}{value}' for key, value in own.items())}"
    settings = [word for key, value in own.items() for word in (f"--{key}", str(value))]
    data = [str(zoo.texts[domain]["train"]) for domain in config["experts"]]
    return Job(expert, out, ("fuse", "cache", str(zoo.experts[expert]), "--data", *data, "--out", str(out), *settings))


def fusion(config: Config, zoo: Zoo, work: Path, name: str, caches: Sequence[Path]) -> dict[str, Any]:
    """Return the recipe of a training."""
    run = config["runs"][name]
    return {
        "student": str(zoo.base if run["student"] == "base" else work / run["student"]),
        "sources": [{"cache": str(path)} for path in caches],
        **({"choice": run["choice"]} if "choice" in run else {}),
        "lambda": run["lambda"],
        "training": dict(config["training"]),
    }


def _training(config: Config, zoo: Zoo, work: Path, name: str, caches: Sequence[Job]) -> Job:
    run = config["runs"][name]
    # all caches hold the same sequences: for a training in which no expert has a say one of them does
    sources = [job.out for job in (caches[:1] if run["sources"] == "first" else caches)]
    document = fusion(config, zoo, work, name, sources)
    # a model of other settings is another one
    digest = hashlib.sha256(yaml.safe_dump(document).encode()).hexdigest()[:8]
    out = work / f"{name}-{digest}"
    recipe = out.with_suffix(".yaml")
    _write(recipe, document)
    needs = [*sources, *([work / "average"] if run["student"] == "average" else [])]
    # the control is a training of its own here, so that its model is written
    return Job(name, out, ("fuse", "train", str(recipe), str(out), "--no-control", "--device", "cpu"), tuple(needs))


def _write(file: Path, document: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(document), sort_keys=False), encoding="utf-8")


def perform(found: Sequence[Job], processes: int, do: Callable[[Job], None]) -> None:
    """Do some jobs, several at once, each when what it needs is there; those whose folder is there are left out.

    Args:
        found: The jobs.
        processes: How many at once.
        do: Does one.
    """
    waiting = [job for job in found if not job.out.exists()]
    (waiting[0].out.parent if waiting else Path()).mkdir(parents=True, exist_ok=True)
    running: dict[Future[None], Job] = {}
    with ThreadPoolExecutor(processes) as pool:
        while waiting or running:
            ready = [job for job in waiting if all(path.exists() for path in job.needs)]
            for job in ready[: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(do, job)] = job
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                done.result()
