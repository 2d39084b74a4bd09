"""Measures merges one by one: floor, merge, floor; start-up; the same with mergekit."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from . import hardware, peer
from .check import WrongResult, check_hashes, check_merge, size_of, weight_files
from .checkpoints import Models, Tensors, make_models
from .measure import CommandError, Floor, KilledError, Usage, as_json, cached_share, forget, measure_floor, run, spread
from .recipes import METHODS, inputs, recipe


def default_folder() -> Path:
    """Return where models and outputs lie: `$MERGANSER_BENCH`, else the user's cache folder."""
    if given := os.environ.get("MERGANSER_BENCH"):
        return Path(given).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "merganser" / "bench"


class Report:
    """A result file, written anew after every measurement, so that what was measured survives what follows.

    Args:
        file: Where it goes.
        scenario: What is measured.
        config: The settings.
        machine: From `hardware.describe`.
    """

    def __init__(self, file: Path, scenario: str, config: dict[str, Any], machine: dict[str, Any]) -> None:
        self._file = file
        self._content = {
            "scenario": scenario,
            "config": config,
            "hardware": machine,
            "load_before": hardware.load(),
            "results": [],
        }
        self.failed = 0

    def add(self, key: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
        """Measure something and keep the result; a failure is kept and told, and does not stop what follows."""
        label = key["method"] + (f" {key['axis']} {key['value']}" if "axis" in key else "")
        load = hardware.load()
        try:
            found = measured()
        except (CommandError, WrongResult, OSError) as error:
            sys.stderr.write(f"{label}: {error}\n")
            self.failed += 1
            # without the message: it may name folders
            found = {"error": type(error).__name__}
        self.failed += "peer_error" in found
        found |= {"load_before": load, "load_after": hardware.load()}
        self._content["results"].append({**key, **found})
        self._content["load_after"] = hardware.load()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(self._file.name + ".partial")
        partial.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._file)
        if "error" not in found:
            sys.stdout.write(f"{label:24} {line(found)}\n")
            sys.stdout.flush()


@dataclass
class Session:
    """Measures merges.

    Args:
        folder: Holds models, recipes, outputs.
        runs: How often each merge is measured.
        threads: Threads for merganser and mergekit; their own defaults where None.
        cold: Measure also with the inputs out of the page cache.
        peer: The environment of mergekit, to measure it, too.
        peer_once_above: Seconds above which a merge of mergekit is not repeated.
        timeout: Seconds after which a merge is stopped.
    """

    folder: Path
    runs: int = 3
    threads: int | None = None
    cold: bool = False
    peer: Path | None = None
    peer_once_above: float = 60.0
    timeout: float = 3600.0

    @property
    def out(self) -> Path:
        """The target of every merge."""
        return self.folder / "out"

    @property
    def models(self) -> Path:
        """Holds the models."""
        return self.folder / "models"

    def make(self, name: str, tensors: Tensors, n_experts: int, config: dict[str, Any] | None) -> Models:
        """Make models of that name, or find them made."""
        return make_models(self.models / name, tensors, n_experts, config)

    def merge(self, name: str, models: Models, tiny: Models, options: Sequence[str] = ()) -> dict[str, Any]:
        """Measure a method.

        Args:
            name: The method.
            models: The inputs.
            tiny: The same tensors at the least size: merging these is start-up.
            options: Further options of `merganser merge`.

        Returns:
            See README.md.

        Raises:
            CommandError: A merge failed.
            WrongResult: It is not what it must be.
        """
        given, small = self.write_recipe(name, models), self.write_recipe(name, tiny)
        files = _files(name, models)
        first = self.run(given, options)
        written = size_of(weight_files(self.out))
        check = check_merge(name, models, self.out)
        expected = check_hashes(self.out)
        found: dict[str, Any] = {
            "read_bytes": size_of(files),
            "written_bytes": written,
            "first": as_json(first),
            "check": check,
        }
        startups, runs = [], []
        for _ in range(self.runs):
            startups.append(self.run(small, options))
            runs.append(self._between_floors(files, written, lambda: self.run(given, options)))
            if check_hashes(self.out) != expected:
                raise WrongResult(f"{name}: two runs wrote different bytes")
        startup = median(usage.seconds for usage in startups)
        found["startup"] = spread([usage.seconds for usage in startups])
        found |= summary(runs, startup)
        if self.cold:
            cold = [
                self._between_floors(files, written, lambda: self.run(given, options), cold=True)
                for _ in range(self.runs)
            ]
            found["cold"] = summary(cold, startup)
        if self.peer is not None:
            try:
                found["peer"] = self._peer(name, models, given, small, files, written)
                found["faster"] = round(found["peer"]["seconds"]["median"] / found["seconds"]["median"], 2)
            except (CommandError, WrongResult) as error:
                sys.stderr.write(f"{name}, mergekit: {error}\n")
                found["peer_error"] = type(error).__name__
        shutil.rmtree(self.out, ignore_errors=True)
        return found

    def kill(self, name: str, models: Models, moments: Sequence[float]) -> dict[str, Any]:
        """Kill a merge at some moments, continue it by the same command each time, and compare the bytes.

        Args:
            name: The method.
            models: The inputs.
            moments: When to kill it, as shares of the time that it takes.

        Returns:
            `seconds`, of a merge that nobody kills; `killed_after`, seconds, each since the last start; `continued`, how
            often a run began with what another had left; `last`, seconds of the run that ended it.

        Raises:
            CommandError: It does not go on.
            WrongResult: It ends with other bytes, or leaves something behind.
        """
        given = self.write_recipe(name, models)
        self.run(given)
        whole = self.run(given)
        expected = check_hashes(self.out)
        self._clear()
        killed, continued = [], 0
        for moment in moments:
            left = self._beside()
            try:
                self.run(given, fresh=False, timeout=moment * whole.seconds)
            except KilledError:
                killed.append(round(moment * whole.seconds, 2))
            if self.out.exists():
                # what is there is complete, whether the process had ended or not; what follows begins again
                self._check_continued(name, expected)
                self._clear()
            continued += bool(left)
        last = self.run(given, fresh=False)
        self._check_continued(name, expected)
        self._clear()
        return {
            "seconds": spread([whole.seconds]),
            "killed_after": killed,
            "continued": continued,
            "last": round(last.seconds, 2),
        }

    def _check_continued(self, name: str, expected: str) -> None:
        if check_hashes(self.out) != expected:
            raise WrongResult(f"{name}: after a kill it wrote other bytes")
        if left := self._beside():
            raise WrongResult(f"{name}: {', '.join(left)} stayed behind")

    def _beside(self) -> list[str]:
        """Return what lies beside the target."""
        return sorted(path.name for path in self.folder.glob(f".{self.out.name}*"))

    def run(
        self,
        recipe_file: Path,
        options: Sequence[str] = (),
        verb: str = "merge",
        *,
        fresh: bool = True,
        timeout: float | None = None,
    ) -> Usage:
        """Run merganser once."""
        command = [sys.executable, "-m", "merganser", verb, str(recipe_file)]
        if verb == "merge":
            if fresh:
                self._clear()
            command += [str(self.out), "--quiet"]
        if self.threads is not None:
            command += ["--threads", str(self.threads)]
        return run([*command, *options], self.folder / "log.txt", timeout=timeout or self.timeout)

    def _peer(
        self, name: str, models: Models, given: Path, small: Path, files: Sequence[Path], written: int
    ) -> dict[str, Any]:
        startups, runs = [], []
        check: dict[str, Any] = {}
        while len(runs) < self.runs and (not runs or runs[0][0].seconds < self.peer_once_above):
            startups.append(self._run_peer(small))
            runs.append(self._between_floors(files, written, lambda: self._run_peer(given)))
            check = check or check_merge(name, models, self.out, strict=False)
        startup = median(usage.seconds for usage in startups)
        return {
            "written_bytes": size_of(weight_files(self.out)),
            "startup": spread([usage.seconds for usage in startups]),
            "check": check,
            **summary(runs, startup),
        }

    def _run_peer(self, recipe_file: Path) -> Usage:
        assert self.peer is not None
        self._clear()
        command = [*peer.command(self.peer, recipe_file, self.out)]
        if self.threads is not None:
            command += ["--num-threads", str(self.threads)]
        return run(command, self.folder / "log.txt", timeout=self.timeout)

    def _between_floors(
        self, files: Sequence[Path], written: int, merge: Callable[[], Usage], *, cold: bool = False
    ) -> tuple[Usage, Floor, Floor, float]:
        """Measure the floor, a merge, and the floor again; also say what the page cache held before the merge."""
        before = measure_floor(files, written, self.folder, cold=cold)
        if cold:
            forget(files)
        cached = cached_share(files)
        usage = merge()
        return usage, before, measure_floor(files, written, self.folder, cold=cold), cached

    def _clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def write_recipe(self, name: str, models: Models) -> Path:
        """Write the recipe of a method for these models."""
        file = self.folder / "recipes" / f"{name}-{models.base.parent.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe(name, models), encoding="utf-8")
        return file


def summary(runs: Sequence[tuple[Usage, Floor, Floor, float]], startup: float) -> dict[str, Any]:
    """Sum up runs of one merge, each with the floor before, after, and the share of its inputs in the page cache."""
    above = [usage.seconds - startup for usage, *_ in runs]
    floors = [(before.seconds + after.seconds) / 2 for _, before, after, _ in runs]
    syncs = [(before.sync + after.sync) / 2 for _, before, after, _ in runs]
    return {
        "seconds": spread([usage.seconds for usage, *_ in runs]),
        "cpu_seconds": spread([usage.cpu_seconds for usage, *_ in runs]),
        "above_startup": spread(above),
        "floor": spread([floor.seconds for _, *both, _ in runs for floor in both]),
        "floor_synced": spread([floor.seconds + floor.sync for _, *both, _ in runs for floor in both]),
        "ratio": spread([time / floor for time, floor in zip(above, floors, strict=True)]),
        "ratio_synced": spread([time / (floor + sync) for time, floor, sync in zip(above, floors, syncs, strict=True)]),
        "peak_mb": round(max(usage.peak_bytes for usage, *_ in runs) / 1e6, 1),
        "cached": min(cached for *_, cached in runs),
        "runs": [
            {"merge": as_json(usage), "floor_before": as_json(before), "floor_after": as_json(after)}
            for usage, before, after, _ in runs
        ],
    }


def line(found: dict[str, Any]) -> str:
    """Sum up a result for the terminal."""
    parts = []
    if "above_startup" in found:
        low, high = found["ratio"]["min"], found["ratio"]["max"]
        parts.append(
            f"{found['above_startup']['median']:.2f} s above a start-up of {found['startup']['median']:.2f} s; "
            f"{found['ratio']['median']:.2f} x floor ({low:.2f} to {high:.2f})"
        )
    elif "killed_after" in found:
        moments = ", ".join(f"{seconds:.1f}" for seconds in found["killed_after"])
        parts.append(f"killed after {moments} s, continued {found['continued']} times: the same bytes")
    elif "seconds" in found:
        parts.append(f"{found['seconds']['median']:.2f} s")
    if "cold" in found:
        parts.append(f"cold {found['cold']['ratio']['median']:.2f} x floor")
    if "peak_mb" in found:
        parts.append(f"{found['peak_mb']:.0f} MB")
    if "time_ratio" in found:
        parts.append(f"limited {found['time_ratio']:.2f} x the time, {found['limited']['peak_mb']:.0f} MB")
    if "peer" in found:
        peer_found = found["peer"]
        parts.append(
            f"mergekit {peer_found['seconds']['median']:.1f} s ({found['faster']:.1f} x), {peer_found['peak_mb']:.0f} MB"
        )
    return "; ".join(parts)


def _files(name: str, models: Models) -> list[Path]:
    return [file for folder in inputs(name, models) for file in weight_files(folder)]


def bars(name: str) -> dict[str, Any]:
    """Return the bars of a method, for its result."""
    method = METHODS[name]
    return {"bar": method.bar, **({"peer_bar": method.peer_bar} if method.peer_bar else {})}
