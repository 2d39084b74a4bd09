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
    failed = next((f"{domain}: {part['failed']}" for domain, part in parts.items() if part["failed"]), None)
    measured = {
        "seconds": {key: sum(part["seconds"][key] for part in parts.values()) for key in ("load", "score")},
        "peak_memory": max(part["peak_memory"] for part in parts.values()),
        "failed": failed,
        "bits_per_byte": {domain: part["bits_per_byte"]["merge"] for domain, part in parts.items()},
    }
    if failed:
        return {**measured, "retention": None}
    size = stored["shared_bytes"] + sum(task["bytes"] for task in stored["tasks"])
    return {
        **measured,
        "retention": _retention({domain: part["retention"] for domain, part in parts.items()}),
        "gains": {domain: part["gains"][domain] for domain, part in parts.items()},
        "stored_share": size / sum(task["full_bytes"] for task in stored["tasks"]),
        "needs_base": stored["needs_base"],
    }


def _retention(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of each domain's own model, their mean and the worst."""
    own = {domain: retention["recovered"][domain] for domain, retention in found.items()}
    lost = [retention["mean_forgotten"] for retention in found.values()]
    worst = min(own, key=lambda domain: own[domain]["value"])
    return {
        "recovered": own,
        "mean": {**_mean([*own.values()]), "domains": len(own)},
        "worst": {"domain": worst, **own[worst]},
        # one text for all, so their errors do not cancel
        "mean_forgotten": {
            "value": sum(one["value"] for one in lost) / len(lost),
            "stderr": max(one["stderr"] for one in lost),
        },
    }


def _mean(found: list[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of independent figures."""
    error = math.sqrt(sum(one["stderr"] ** 2 for one in found)) / len(found)
    return {"value": sum(one["value"] for one in found) / len(found), "stderr": error}
