"""An evaluation as `merganser eval --json` writes it, with made-up numbers."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from merganser.inference.sources import open_source


def measured(value: float | None, stderr: float | None = 0.01, **more: Any) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, **more}


def evaluation(out: Path, domains: tuple[str, ...] = ("french", "maths"), merges: int = 1) -> dict[str, Any]:
    """A base, an expert for each domain, and merges; the first of them is `out`."""
    with ExitStack() as stack:
        own = open_source(out, stack).hash
    model = {
        "kind": "checkpoint",
        "parameters": 1576,
        "tokenizer": "ab",
        "hash": "9f",
        "peak_memory": 9,
        "failed": None,
    }
    model |= {"seconds": {"load": 0.4, "score": 12.1}}
    experts = {domain: f"expert-{domain}" for domain in domains}
    names = [f"merge-{i + 1}" for i in range(merges)]
    task = {"kind": "text", "source": "f.txt", "hash": "0", "metrics": ["bits_per_byte"], "items": 64, "unit": "window"}
    tasks: dict[str, Any] = {
        domain: {**task, "role": "domain", "metric": "bits_per_byte", "higher_is_better": False} for domain in domains
    }
    tasks["english"] = {**task, "role": "retained", "metric": "accuracy", "higher_is_better": True, "unit": "question"}

    def results(quality: float) -> dict[str, Any]:
        found = {
            domain: {"failed": None, "items": 64, "metrics": {"bits_per_byte": measured(1.5 - quality / (k + 2))}}
            for k, domain in enumerate(domains)
        }
        english = {"accuracy": measured(0.61 - quality / 50, 0.06), "accuracy_norm": measured(0.64)}
        return {**found, "english": {"failed": None, "items": 64, "metrics": english}}

    def kept(share: float) -> dict[str, Any]:
        return {
            "recovered": {domain: measured(share - k / 10, 0.02) for k, domain in enumerate(domains)},
            "mean": measured(share, 0.02, domains=len(domains)),
            "worst": measured(share - (len(domains) - 1) / 10, 0.03, domain=domains[-1]),
            "forgotten": {"english": measured(share / 50, 0.03, relative=share / 30, relative_stderr=0.02)},
            "mean_forgotten": measured(share / 30, 0.02, tasks=1),
            "against_best_single": measured(share - 0.55, 0.02),
        }

    qualities = {name: 0.2 + 0.08 * i for i, name in enumerate([*experts.values(), *names])}
    return {
        "format": 1,
        "kind": "evaluation",
        "created": "2026-11-21T10:30:00Z",
        "versions": {"merganser": "0.1.0", "lm_eval": None},
        "hardware": {"device": "cpu", "processor": "some", "threads": 2},
        "settings": {"limit": 64, "context": 512, "dtype": "bfloat16"},
        "base": "base",
        "experts": experts,
        "models": {
            "base": {**model, "reference": "models/base", "role": "base"},
            **{name: {**model, "reference": f"models/{name}", "role": "expert"} for name in experts.values()},
            **{
                name: {**model, "reference": str(out), "role": "model", "hash": own if i == 0 else "1"}
                for i, name in enumerate(names)
            },
        },
        "tasks": tasks,
        "results": {"base": results(0.0), **{name: results(quality) for name, quality in qualities.items()}},
        "differences": {
            "reference": "base",
            "models": {
                name: {
                    task: {"metric": found["metric"], **measured(-0.1, 0.002), "paired": True}
                    for task, found in tasks.items()
                }
                for name in names
            },
        },
        "retention": {
            "domains": {
                domain: {
                    "expert": expert,
                    "metric": "bits_per_byte",
                    "gain": measured(0.4),
                    "counted": True,
                    "reason": None,
                }
                for domain, expert in experts.items()
            },
            "retained": ["english"],
            "best_single": {"model": next(iter(experts.values())), "recovered": measured(0.55)},
            "models": {name: kept(quality) for name, quality in qualities.items()},
        },
        "seconds": 123.4,
        "peak_memory": 900_000_000,
        "items": "eval.json.items.jsonl",
        "warnings": [],
    }


def write_evaluation(file: Path, found: dict[str, Any]) -> Path:
    file.write_text(json.dumps(found))
    return file
