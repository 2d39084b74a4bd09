"""What the restored model of every task keeps, as one result."""

import math
from collections.abc import Mapping
from typing import Any


def combined(parts: Mapping[str, Mapping[str, Any]], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Put the results of restored models together: each counts on the domain of its own expert.

    Args:
        parts: The result of each restored model, by its domain.
        stored: What the run record says of sidecars.

    Returns:
        A result, also with what is stored beside the shared model as a share of the experts' bytes.
    """
    own = {domain: part["retention"]["recovered"][domain] for domain, part in parts.items()}
    lost = [part["retention"]["mean_forgotten"] for part in parts.values()]
    worst = min(own, key=lambda domain: own[domain]["value"])
    size = stored["shared_bytes"] + sum(task["bytes"] for task in stored["tasks"])
    return {
        "retention": {
            "recovered": own,
            "mean": {**_mean([*own.values()]), "domains": len(own)},
            "worst": {"domain": worst, **own[worst]},
            # one text for all, so their errors do not cancel
            "mean_forgotten": {
                "value": sum(found["value"] for found in lost) / len(lost),
                "stderr": max(found["stderr"] for found in lost),
            },
        },
        "gains": {domain: part["gains"][domain] for domain, part in parts.items()},
        "seconds": {key: sum(part["seconds"][key] for part in parts.values()) for key in ("load", "score")},
        "peak_memory": max(part["peak_memory"] for part in parts.values()),
        "failed": next((part["failed"] for part in parts.values() if part["failed"]), None),
        "stored_share": size / sum(task["full_bytes"] for task in stored["tasks"]),
        "needs_base": stored["needs_base"],
        "bits_per_byte": {domain: part["bits_per_byte"]["merge"] for domain, part in parts.items()},
    }


def _mean(found: list[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of independent figures."""
    error = math.sqrt(sum(one["stderr"] ** 2 for one in found)) / len(found)
    return {"value": sum(one["value"] for one in found) / len(found), "stderr": error}
