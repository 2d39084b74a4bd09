"""The four adapters merged from their factors: nothing is rounded before the merge.

Each row of `factors` in config.json is merged in one of two ways: as adapters, where the output is an adapter (float32, of as
high a rank as loses nothing, unless the row gives one) that is measured on its base; or as models, each the base with an
adapter, computed in float32 while it is read. What is measured is rounded once, as the experts are: to bfloat16 where
`merganser eval` computes in it.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.merge import hardware
from benchmarks.zoo import Zoo, shipped
from merganser import MergeError, merge
from merganser.errors import OutputError

from .measured import measured

_KEYS = ("method", "as", "rank", "setting")


def adapters_of(zoo: Zoo, config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the adapters by domain: those of the zoo, else those of the repository."""
    return {name: zoo.adapters.get(name, shipped.FOLDER / name) for name in config["sets"]["adapters"]["adapters"]}


def recipe(row: Mapping[str, Any], base: Path, adapters: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """Return the recipe of a row of config.json."""
    setting, as_models = row["setting"], row["as"] == "models"
    entries = [
        {
            "model": f"{base}+{path}" if as_models else str(path),
            **({"parameters": each} if (each := setting["each"]) else {}),
        }
        for path in adapters.values()
    ]
    found: dict[str, Any] = {
        "merge_method": row["method"],
        "base_model": str(base),
        "models": entries,
        "dtype": "float32",
        "random_seed": seed,
    }
    if setting["shared"]:
        found["parameters"] = setting["shared"]
    if row.get("rank"):
        found["rank"] = row["rank"]
    return found


def run(config: Mapping[str, Any], zoo: Zoo, results: Path, work: Path, chosen: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet."""
    results.mkdir(parents=True, exist_ok=True)
    folder = work / "factors"
    folder.mkdir(parents=True, exist_ok=True)
    file, adapters = results / "factors.jsonl", adapters_of(zoo, config)
    experts = {domain: f"{zoo.base}+{path}" for domain, path in adapters.items()}
    known = read(file)
    for name, row in config["factors"].items():
        if (chosen is not None and name not in chosen) or key(name, row) in [key(k["name"], k) for k in known]:
            continue
        started = time.monotonic()
        result = {"name": name, **{each: row.get(each) for each in _KEYS}}
        written, out = folder / "recipe.yaml", folder / "merged"
        written.write_text(yaml.safe_dump(recipe(row, zoo.base, adapters, config["seeds"][0])), encoding="utf-8")
        try:
            model = str(written)
            if row["as"] == "adapters":
                done = merge(written, out, overwrite=True)
                result["merge_seconds"] = done.record["timings"]["seconds"]
                model = f"{zoo.base}+{out}"
            result |= measured(model, experts, zoo, config, "test", folder)
        except OutputError:
            raise
        except MergeError as error:
            result |= {"retention": None, "failed": str(error)}
        shutil.rmtree(out, ignore_errors=True)
        result["hardware"] = hardware.describe(folder)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")
        sys.stdout.write(f"factors {name}: {time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()


def key(name: str, row: Mapping[str, Any]) -> str:
    """Return what tells results apart."""
    return json.dumps([name, *(row.get(each) for each in _KEYS)], sort_keys=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the results."""
    if not file.exists():
        return []
    return [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def table(results: Path, config: Mapping[str, Any], rounded: Mapping[str, str]) -> str | None:
    """Return the table of these rows, the best first; None if nothing is measured.

    Args:
        results: Folder of the results.
        config: The settings; results at other ones are left out.
        rounded: What the same methods keep of the experts in bfloat16, by method.
    """
    wanted = {key(name, row) for name, row in config["factors"].items()}
    rows = {found["name"]: found for found in read(results / "factors.jsonl") if key(found["name"], found) in wanted}
    if not rows:
        return None
    lines = [
        "The four adapters merged from their factors, in percent: mean of the domains / worst domain; as adapters (the output is "
        "an adapter), or as models (each the base with an adapter, in float32), and beside it what the same method kept of the "
        "four experts in bfloat16, at the same settings. Here weights are rounded once, when the merge is measured in bfloat16. "
        "`robust_merge` is the form for factors here, and that for weights in the last column.",
        "",
        "| method | merged as | from factors | forgotten | from rounded experts |",
        "|---|---|---|---|---|",
    ]
    for name, found in sorted(rows.items(), key=lambda item: -_mean(item[1])):
        if found["retention"] is None or found["retention"]["mean"]["value"] is None:
            lines.append(f"| {name} | {found['as']} | failed: {found['failed']} | | {rounded.get(name, '')} |")
            continue
        kept = found["retention"]
        rank = f", rank {found['rank']}" if found["rank"] else ""
        lines.append(
            f"| {name} | {found['as']}{rank} | {100 * _mean(found):.0f} / {100 * kept['worst']['value']:.0f} "
            f"| {100 * kept['mean_forgotten']['value']:.1f} % | {rounded.get(name, '')} |"
        )
    return "\n".join([*lines, ""])


def _mean(found: Mapping[str, Any]) -> float:
    kept = found["retention"]
    return float("-inf") if kept is None or kept["mean"]["value"] is None else float(kept["mean"]["value"])
