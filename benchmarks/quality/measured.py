"""What a merge keeps of the experts, measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.zoo import Zoo
from merganser import evaluate
from merganser.evaluation.result import Evaluation


def measured(
    model: str, experts: Mapping[str, Path | str], zoo: Zoo, config: Mapping[str, Any], split: str, folder: Path
) -> dict[str, Any]:
    """Measure a merge on the domains of the experts and on the text that nobody was trained on.

    Args:
        model: The merge: a folder, a recipe, a base with an adapter.
        experts: The experts, by the domain that each was trained for.
        zoo: Base and texts.
        config: How much text.
        split: "test" or "tune".
        folder: Keeps what was measured of base and experts.
    """
    evaluation = evaluated(model, experts, zoo, config, split, folder)
    content = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    return {
        "retention": content["retention"]["models"]["merge"],
        "gains": {domain: found["gain"] for domain, found in content["retention"]["domains"].items()},
        "seconds": evaluation.models["merge"].seconds,
        "peak_memory": evaluation.peak_memory,
        "failed": evaluation.models["merge"].failed,
        "bits_per_byte": {
            name: {task: outcome.metrics["bits_per_byte"].value for task, outcome in tasks.items() if outcome.metrics}
            for name, tasks in evaluation.outcomes.items()
        },
    }


def evaluated(
    model: str, experts: Mapping[str, Path | str], zoo: Zoo, config: Mapping[str, Any], split: str, folder: Path
) -> Evaluation:
    """Run the evaluation of `measured`, with the same arguments; its JSON is `SPLIT.json` in the folder."""
    domains = [*experts, zoo.retained]
    # base and experts are measured once per split: the journal beside the file knows them
    journal = folder / f"{split}.json"
    return evaluate(
        {"merge": model},
        {domain: zoo.texts[domain][split] for domain in domains},
        base=str(zoo.base),
        experts={domain: str(path) for domain, path in experts.items()},
        limit=config["windows"],
        context=config["context"],
        stride=config["context"],
        json=journal,
    )
